"""`python -m lcikernels.compat`: writes SERVED.md, what every function serves, argument by argument."""

from importlib import import_module
from pathlib import Path

from .serving import table

PAGE = Path(__file__).with_name("SERVED.md")
MODULES = ("causal_conv1d", "fla", "mamba_ssm")


def page() -> str:
    """The table of every module here that has decorated functions."""
    for name in MODULES:
        import_module(f"lcikernels.compat.{name}")
    return table()


if __name__ == "__main__":
    PAGE.write_text(page())
