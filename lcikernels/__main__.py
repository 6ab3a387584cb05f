"""`python -m lcikernels`: which backend of which op runs here, and why the others do not."""

import torch

from . import ops as _entered  # noqa: F401  the tables fill as the ops are imported
from .backends import TABLES


def main() -> None:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    width = max(map(len, TABLES))
    print(f"torch {torch.__version__}")
    for device in devices:
        probe = torch.empty(1, device=device)
        for op, backends in TABLES.items():
            for name, backend in backends.items():
                print(f"{op:{width}}  {device:4}  {name:6}  {backend.why_not(probe) or 'runs'}")


if __name__ == "__main__":
    main()
