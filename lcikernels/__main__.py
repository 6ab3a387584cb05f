"""`python -m lcikernels`: what runs here and with what, or why not and what would make it run."""

import signal
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from . import extension
from . import ops as _entered  # noqa: F401  the tables fill as the ops are imported
from .backends import TABLES, Backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LIBRARIES = ("lcikernels", "torch", "triton", "transformers")
ELSEWHERE = {  # why a backend does not run for a tensor on the CPU, said of the machine
    "it runs on a GPU, x is on cpu": "it runs on a GPU: with a torch that sees one, for tensors on it",
}


def verdict(backend: Backend, device: str) -> str:
    """What the backend runs with, or why it does not run and what would make it."""
    reasons = {dtype: backend.why_not(torch.empty(1, dtype=dtype, device=device)) for dtype in DTYPES}
    runs = [str(dtype).removeprefix("torch.") for dtype, why in reasons.items() if why is None]
    if not runs:
        return ELSEWHERE.get(reasons[torch.float32], reasons[torch.float32])
    return "runs" if len(runs) == len(DTYPES) else f"runs with {', '.join(runs)}"


def installed(library: str) -> str:
    """Its version, or how to get it."""
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return f"no {library} (pip install {library})"


def devices() -> dict[str, str]:
    """Those that torch sees, and what they are."""
    found = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    for i in range(torch.cuda.device_count()):
        found[f"cuda:{i}"] = torch.cuda.get_device_name(i)
    return found


def transformers() -> str:
    """Whether its models compute with these kernels in this process."""
    compat = sys.modules.get("lcikernels.compat.transformers")
    if compat is not None and compat.is_patched():
        return "transformers is patched: its models compute with these kernels"
    return "transformers is not patched in this process: lcikernels.compat.transformers.patch() does it"


def main() -> None:
    """Print it."""
    found, width = devices(), max(map(len, TABLES))
    cpp = (
        f"none: {extension.WHY_NOT}"
        if extension.WHY_NOT
        else f"for {torch.ops.lcikernels_cpp.instruction_set()}"
    )
    print(", ".join(map(installed, LIBRARIES)))
    print(f"compiled kernels: {cpp}")
    print("devices:", ", ".join(f"{name} ({what})" for name, what in found.items()))
    print(transformers())
    for device in found:
        for op, backends in TABLES.items():
            for name, backend in backends.items():
                print(f"{op:{width}}  {device:6}  {name:6}  {verdict(backend, device)}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head -1` ends it, as it does any command
    main()
