"""What somebody does who installed the wheel: run by that environment's Python, in a folder of theirs.

    python wheel_user.py torch pure         where torch alone is installed beside it
    python wheel_user.py growth compiled    where what lcikernels[growth] asks for is, too; or growth pure

pure: of a wheel without compiled kernels.

It imports the tolerance that the tests have, which lies beside this file, and of the checkout nothing else.
"""

import subprocess
import sys
from contextlib import chdir
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pkgutil import walk_packages
from tempfile import TemporaryDirectory

import torch
from tolerance import assert_agrees
from torch import Tensor

import growth
import lcikernels
from lcikernels import extension

BIN = Path(sys.executable).parent
SIZES = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2)
INSTALL = "pip install 'lcikernels[growth]'"


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def ops() -> None:
    """Each against its reference in float64, forward and backward, by the backend that is chosen here."""
    torch.manual_seed(0)
    B, T, D, N, H, K, V, W = 2, 37, 24, 4, 3, 8, 5, 4
    inputs = {
        "retention": dict(q=random(B, T, H, K), k=random(B, T, H, K), v=random(B, T, H, V)),
        "selective_scan": dict(x=random(B, T, D), dt=random(B, T, D), a=-torch.rand(D, N) - 0.1),
        "causal_conv1d": dict(x=random(B, T, D), weight=random(D, W), bias=random(D), activation="silu"),
        "gated_rms_norm": dict(x=random(B, T, D), gate=random(B, T, D), weight=random(D)),
        "kronecker_expand": dict(weight=random(2, 8, 6), write=random(12, 8), read=random(9, 6)),
    }
    inputs["retention"] |= dict(log_decay=-torch.rand(H), initial_state=random(B, H, K, V))
    inputs["selective_scan"] |= dict(b=random(B, T, N), c=random(B, T, N), d=random(D), dt_softplus=True)
    for op, given in inputs.items():
        reference = import_module(f"lcikernels.ops.{op}.reference")
        assert_agrees(getattr(lcikernels, op), getattr(reference, op), **given)


def layers() -> None:
    from lcikernels import layers

    made = layers.Mamba(8), layers.Mamba2(32), layers.Retention(8, 2), layers.LightningAttention(8, 2)
    for layer in made:
        assert layer(torch.randn(1, 3, layer.hidden_size)).isfinite().all()


def said(*command: str | Path) -> tuple[int, str]:
    """The exit code of a command, and the last line of what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    return done.returncode, lines[-1]


def modules(libraries: str) -> None:
    """Each is importable, or names a library that is not there: Triton, or with torch alone another."""
    for package in lcikernels, growth:
        for module in walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda name: None):
            if module.name.endswith(("__main__", "_C")):  # runs, or is no module
                continue
            try:
                import_module(module.name)
            except ModuleNotFoundError as error:
                name = error.name.partition(".")[0]
                ours = name in ("lcikernels", "growth", "torch")
                assert name == "triton" or (libraries == "torch" and not ours), f"{module.name}: {error}"


def without_growth() -> None:
    """What needs more libraries says in a line which, and how to get them."""
    for words in ("--help",), ("inspect", "nothing"):
        code, line = said(BIN / "growth", *words)
        assert code == 2 and line.startswith("growth: No module named ") and INSTALL in line, line
    code, line = said(sys.executable, "-m", "lcikernels.compat.transformers")
    assert code == 1 and line.endswith(f"needs transformers: {INSTALL}"), line
    from lcikernels.compat.transformers import patch

    for call in patch, lambda: growth.grow("small", "large"), lambda: import_module("lcikernels.models"):
        try:
            call()
        except ModuleNotFoundError as error:
            assert INSTALL in str(error), error
        else:
            raise AssertionError(f"{call} went on without its libraries")


def patched() -> None:
    """A Mamba of transformers on these kernels."""
    from transformers import MambaConfig, MambaForCausalLM

    from lcikernels.compat.transformers import is_patched, patch

    model = MambaForCausalLM(MambaConfig(**SIZES, state_size=4)).eval()
    tokens = torch.randint(64, (2, 9))
    with torch.no_grad():
        plain = model(tokens).logits
        with patch():
            assert is_patched()
            ours = model(tokens).logits
    torch.testing.assert_close(ours, plain)
    assert not torch.equal(ours, plain), "patched, it computes with other kernels"


def verbs() -> None:
    """Grow, check and transfer a model, by the command line and by Python."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(**SIZES, num_attention_heads=2, intermediate_size=32)
    GPTNeoXForCausalLM(config).save_pretrained("small")
    grown = ("--method", "lemon", "--hidden-size", "24", "--num-layers", "3")
    for words in ("grow", "small", "large", *grown), ("check", "small", "large"), ("--help",):
        code, line = said(BIN / "growth", *words)
        assert code == 0, line
    assert growth.check("small", "large").kept
    assert growth.transfer("small", "retnet", mixers="retention")


def main(libraries: str, kernels: str) -> None:
    for package in lcikernels, growth:
        assert Path(package.__file__).is_relative_to(sys.prefix), (
            f"{package.__file__} is not what was installed"
        )
    assert (extension.WHY_NOT is None) == (kernels == "compiled"), extension.WHY_NOT
    ops()
    layers()
    assert said("sh", "-c", f"'{sys.executable}' -W ignore -m lcikernels | head -1")[1].startswith(
        "lcikernels "
    )
    modules(libraries)
    if libraries == "growth":
        patched()
        with TemporaryDirectory() as folder, chdir(folder):
            verbs()
    else:
        without_growth()
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"Python {python}, torch {version('torch')}, {libraries} libraries, {kernels} kernels: it works")


if __name__ == "__main__":
    main(*sys.argv[1:])
