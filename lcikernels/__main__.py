"""`python -m lcikernels`: which backend of which op runs here and with what, and why the others do not."""

import torch

from . import extension
from . import ops as _entered  # noqa: F401  the tables fill as the ops are imported
from .backends import TABLES, Backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def verdict(backend: Backend, device: str) -> str:
    """What the backend runs with, or why it does not run."""
    reasons = {dtype: backend.why_not(torch.empty(1, dtype=dtype, device=device)) for dtype in DTYPES}
    runs = [str(dtype).removeprefix("torch.") for dtype, why in reasons.items() if why is None]
    if not runs:
        return reasons[torch.float32]
    return "runs" if len(runs) == len(DTYPES) else f"runs with {', '.join(runs)}"


def main() -> None:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    width = max(map(len, TABLES))
    cpp = "none" if extension.WHY_NOT else f"for {torch.ops.lcikernels_cpp.instruction_set()}"
    print(f"torch {torch.__version__}, compiled kernels: {cpp}")
    for device in devices:
        for op, backends in TABLES.items():
            for name, backend in backends.items():
                print(f"{op:{width}}  {device:4}  {name:6}  {verdict(backend, device)}")


if __name__ == "__main__":
    main()
