"""The tables: what each kernel takes on each GPU, and what a call is predicted to take on an H200."""

import re
from collections.abc import Iterator

from triton.backends.compiler import GPUTarget

from benchmarks.work import least

from . import code, model
from .cases import Case, predicted, proven
from .launches import Launch, host, noted
from .programs import AMD, Program, compiled, source

NVIDIA = (80, 90, 100)
HEAD = f"{'':48} {'kernel':24}  sm  registers  spilled  shared  programs"
HEAD += "  its longest loop: slots  waits  barriers  fp64"


def launches(sm: int, names: list[str]) -> Iterator[Launch]:
    """All that are proven on an NVIDIA GPU of compute capability sm / 10, or on AMD's (0); no two alike."""
    seen = set()
    for case in proven():
        what = f"{case.op} {case.what}"
        if not all(re.search(name, what) for name in names):
            continue
        for call in case.calls.values():
            for launch in noted(case.package, what, (1, sm), call, case.replaced).kernels:
                key = source(launch, GPUTarget("cuda", sm or 90, 32)).hash() + str(launch.options)
                if key not in seen:
                    seen.add(key)
                    yield launch


def proof(sm: int, launch: Launch, whole: bool) -> dict[str, object]:
    """A kernel's row. AMD's compiler tells only what it takes of shared memory. whole: what is in the machine
    code too, which takes 0.3 s to read; else of products that run on while others are issued alone."""
    row = {"what": launch.what, "kernel": launch.kernel.__name__, "sm": sm}
    if not sm:
        return row | {"shared": compiled(launch, AMD).metadata.shared}
    program = Program(launch, sm)
    row |= {
        "registers": program.registers,
        "spilled": program.stack,
        "shared": program.shared,
        "programs": model.occupancy(sm, program.registers, program.warps, program.shared),
    }
    if not whole and "wgmma" not in program.asm["ptx"]:
        return row
    longest = program.longest
    return row | {
        "slots": longest.slots,
        "waits": longest.waits,
        "barriers": longest.barriers,
        "fp64": code.counts(program.parsed[0]).fp64,
        "hazards": program.hazards,
    }


def line(row: dict) -> str:
    numbers = f"{row['sm']:3} {row['registers']:10} {row['spilled']:8} {row['shared']:7} {row['programs']:9}"
    iteration = f"{row['slots']:20.0f} {row['waits']:6.0f} {row['barriers']:9.0f} {row['fp64']:5}"
    return f"{row['what']:48} {row['kernel']:24} {numbers} {iteration}"


def prediction(case: Case, mode: str, sm: int = 90) -> dict[str, object]:
    """A call's row, in seconds. slots: of a lane, for each channel, state and token of a scan."""
    limits, call = model.H200, case.calls[mode]
    made = noted(case.package, case.op, (limits.multiprocessors, sm), call, case.replaced)
    each = [model.launched(Program(launch, sm)) for launch in made.kernels]
    seconds, bound = model.predicted(each, made.torch, limits)
    read, x = (sum(u.numel() * u.element_size() for u in us) for us in (case.inputs, (case.output,)))
    forward, backward = least(case.sizes, read, x, case.output.numel())
    state = case.inputs[-1].numel() * case.inputs[-1].element_size()
    floors = {"forward": forward, "backward": backward, "one token": (read + x + state,)}
    lanes = sum(one.programs * one.warps * 32 * one.counts.slots for one in each)
    return {
        "op": f"{case.op}_step" if mode == "one token" else case.op,
        "shape": " ".join(f"{name}={size}" for name, size in case.sizes.items()),
        "mode": mode,
        "by": "ours",
        "predicted": seconds,
        "bound": bound,
        "floor": limits.floor(*floors[mode]),
        "launches": len(each),
        "torch": len(made.torch),
        "host": host(case.package, call, case.replaced),
        "slots": lanes / case.output.numel() / case.sizes.get("N", 1),
    }


def predictions(names: list[str]) -> Iterator[dict[str, object]]:
    for case in predicted():
        for mode in case.calls:
            if all(re.search(name, f"{case.op} {mode}") for name in names):
                yield prediction(case, mode)
