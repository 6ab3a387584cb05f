"""What launchers of Triton kernels ask of the GPU, and of the compiler."""

import torch
from torch import Tensor


def device(x: Tensor) -> tuple[int, int]:
    """Its multiprocessors, and 10 times its compute capability, 0 of AMD's; no GPU: those of a small H100."""
    if not x.is_cuda:
        return 1, 90
    chip = torch.cuda.get_device_properties(x.device)
    return chip.multi_processor_count, 0 if torch.version.hip else 10 * chip.major + chip.minor


def name(x: Tensor) -> str:
    """Its GPU's, as tables of measured tiles are called."""
    return torch.cuda.get_device_properties(x.device).name if x.is_cuda else ""


def options(warps: int) -> dict[str, object]:
    """All registers that up to 8 warps can have: else some are saved, even where that spills."""
    return dict(num_warps=warps, enable_fp_fusion=True) | ({} if torch.version.hip else dict(maxnreg=255))


# Triton's own take 3 us a call, made to be called in kernels too: half of a launcher's time.
def cdiv(size: int, part: int) -> int:
    """How many parts cover `size`."""
    return -(-size // part)


def power_of_2(size: int) -> int:
    """The least that is not less."""
    return 1 << (size - 1).bit_length()
