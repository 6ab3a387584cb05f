"""What the Triton kernels take on GPUs that are not here: that they compile, keep in registers what they hold
there, never touch what a product still uses, and do no more than is recorded; and what proves that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from resources import code, model, trips

pytest.importorskip("triton.backends.nvidia")
ROOT = Path(__file__).parents[1]
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 0: 64 << 10}  # bytes that a program may have
# Of what `python -m benchmarks.resources` compiles, in so many processes: every kernel with all that is
# optional at once, at the sizes of Mamba, Mamba-2 and RetNet and at the largest.
CASES = [
    "selective_scan N=(16 bfloat16, all|256 bfloat16, all$)",
    "causal_conv1d W=4 bfloat16, all|gated_rms_norm D=(64 .*layer, first|1536 .*rms, bare|256 .*Mamba-2)|"
    "gated_rms_norm D=5000 .*layer, after|retention K=(256 V=512 bfloat16, (all|bare)|128 V=64 )",
]
# Of the others those that take more, not those that differ in masks, in which of it is missing, in warps that
# do the same: float16 takes the registers of bfloat16, filters of 2 and 3 taps less than of 4.
OTHERS = [
    "selective_scan N=(1|32) bfloat16, all",  # the fewest; one token in registers, not two
    "selective_scan N=(16 bfloat16, bare|16 float32, all|256 bfloat16, all, in segments)",
    "causal_conv1d W=(4 .*(float32|bare)|6)",
    "gated_rms_norm D=(300 .*layer, first|256 .*layer, after|(64|300) .*Mamba-2|4096 float32, layer, first)",
    "retention K=128 V=128",
]
# On an H100, bare, bfloat16, an iteration of the kernel's longest loop: instructions, waits, barriers; and
# programs of a multiprocessor. Where it is compiled several times the most, and the fewest.
LONGEST = {
    "retention K=256 V=512 bfloat16, bare": {
        "scores_kernel": (97, 2, 2, 3),
        "walk_kernel": (958, 13, 21, 1),
        "crossing_kernel": (265, 1, 2, 2),
    },
}
# Launches of a call as it is timed on a GPU, Triton's and torch's, and slots of a lane for each element of
# its output, of a scan for each channel, state and token. Forward in time 8 * (N + 3) / N = 9.5 slots are
# free: special functions, of which a multiprocessor begins 16 where 128 lanes issue, take as long.
CALLS = {
    ("selective_scan", "forward"): (2, 2, 9.5),
    ("selective_scan", "backward"): (8, 1, 36.9),
}


def run(*arguments: str) -> list[dict]:
    """In another process: here kernels are the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.resources", "--rows", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("case", CASES + [pytest.param(x, marks=pytest.mark.everything) for x in OTHERS])
def test_kernels_compile_for_every_gpu_spill_nothing_and_wait_for_their_products(case):
    rows = run(case)
    assert {row["sm"] for row in rows} == set(SHARED)
    if case == CASES[1]:
        assert {row["what"].split()[0] for row in rows} == {"causal_conv1d", "gated_rms_norm", "retention"}
        assert {(row["what"], row["kernel"]) for row in rows} >= {(x, y) for x in LONGEST for y in LONGEST[x]}
    for row in rows:
        assert row["shared"] <= SHARED[row["sm"]] and not row.get("spilled") and not row.get("hazards"), row
        assert row.get("programs", 1) >= 1, row
        assert not (row["what"].startswith("retention") and row.get("fp64")), row  # 1 of 64 on most GPUs
        if row["sm"] == 90 and (recorded := LONGEST.get(row["what"], {}).get(row["kernel"])):
            slots, waits, barriers, programs = recorded
            assert row["slots"] <= slots and row["waits"] <= waits and row["barriers"] <= barriers, row
            assert row["programs"] >= programs, row


@pytest.fixture(scope="module")
def predicted():
    """(op, mode): its row."""
    rows = run("--predicted", "^(selective_scan (forward|backward)|gated_rms_norm forward)$")
    found = {(row["op"], row["mode"]): row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize("op, mode", CALLS)
def test_a_call_launches_and_issues_no_more_than_is_recorded(predicted, op, mode):
    row = predicted[op, mode]
    launches, of_torch, slots = CALLS[op, mode]
    assert row["launches"] <= launches and row["torch"] <= of_torch, row
    assert row["predicted"] > 0.8 * row["floor"] and row["host"] > 0, row
    assert row["slots"] <= slots, row


def test_a_norm_is_predicted_to_take_what_memory_takes(predicted):
    row = predicted["gated_rms_norm", "forward"]
    assert row["launches"] == 1 and row["bound"] == "bytes"
    assert row["predicted"] == pytest.approx(row["floor"], rel=0.05)


def machine_code(*rows: str) -> str:
    """As nvdisasm prints it."""
    rows = [
        row if row.startswith((".", "\t")) else f"        /*{16 * i:04x}*/  {row} ;"
        for i, row in enumerate(rows)
    ]
    return "\n".join(["", "//------- .text.some_kernel -------", '\t//## File "/a/walk.py", line 7', *rows])


FIRST = "HGMMA.64x64x16.F32.BF16 R24, R184, gdesc[UR16], R24, gsb0"  # sums from R24 on, a factor from R184
SECOND = "HGMMA.64x64x16.F32.BF16 R56, R188, gdesc[UR16], R56, gsb0"
ALL, ALL_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
SAFE = {
    "after the wait": (FIRST, ALL, "FADD R30, R1, R2", "LDS.128 R184, [R1]"),
    "other registers": (
        FIRST,
        "FADD R56, R1, R2",
        "LDS.128 R188, [R1]",
        "ISETP.GT.AND P0, PT, R1, RZ, PT",
        ALL,
    ),
    "a chain on the same sums": (FIRST, FIRST.replace("R184", "R188"), ALL),
    "a factor of the group that has ended": (FIRST, SECOND, ALL_BUT_ONE, "LDS.128 R184, [R1]", ALL),
    "a factor that is only read": (FIRST, "STS.128 [R1], R184", ALL),
    "a loop that waits": (".L_x_1:", "LDS.128 R184, [R1]", FIRST, ALL, "@P0 BRA `(.L_x_1)"),
    "a descriptor for a factor": (FIRST.replace("R184", "gdesc[UR4]"), "LDS.128 R184, [R1]", ALL),
}
UNSAFE = {
    "a sum is written": (FIRST, "FADD R30, R1, R2", ALL),
    "a sum is read": (FIRST, "FADD R1, R55, R2", ALL),
    "a sum is stored": (FIRST, "STS.128 [R1], R52", ALL),
    "a factor is written": (FIRST, "@!P1 LDS R187, [R1]", ALL),
    "a factor is written by the end of a wide load": (FIRST, "LDG.E.128 R182, desc[UR4][R2.64]", ALL),
    "a factor is written by an older product": (FIRST, "HMMA.16816.F32.BF16 R181, R4, R8, RZ", ALL),
    "a factor is written by a shuffle": (FIRST, "SHFL.BFLY PT, R186, R3, 0x1, 0x1f", ALL),
    "a factor of the group that the wait leaves": (FIRST, SECOND, ALL_BUT_ONE, "LDS.128 R188, [R1]", ALL),
    "sums of the group that the wait leaves": (FIRST, SECOND, ALL_BUT_ONE, "FADD R56, R1, R2", ALL),
    "sums become a factor": (FIRST, SECOND.replace("R188", "R24"), ALL),
    "sums overlap": (FIRST, SECOND.replace("R56", "R40"), ALL),
    "the wait is for something else": (FIRST, "DEPBAR.LE SB0, 0x0", "FADD R30, R1, R2", ALL),
    "the next iteration": (".L_x_1:", "LDS.128 R184, [R1]", FIRST, "@P0 BRA `(.L_x_1)", ALL),
}


def hazards(rows: tuple[str, ...]) -> list[str]:
    return code.in_flight(*code.parse(code.function(machine_code(*rows))))


@pytest.mark.parametrize("why", SAFE)
def test_code_that_waits_for_its_products_is_let_through(why):
    assert not hazards(SAFE[why])


@pytest.mark.parametrize("why", UNSAFE)
def test_a_register_that_a_running_product_uses_is_found(why):
    assert len(hazards(UNSAFE[why])) == 1


def test_machine_code_is_counted_by_loops():
    rows = ["S2R R0, SR_TID.X", ".L_x_1:", "MUFU.EX2 R1, R1", ".L_x_2:", FIRST, ALL, "BAR.SYNC 0x0", "NOP"]
    rows += ["@P0 BRA `(.L_x_2)", "DADD R2, R2, R4", "@P1 BRA `(.L_x_1)", "EXIT", ".L_x_3:", "BRA `(.L_x_3)"]
    instructions, spans = code.parse(code.function(machine_code(*rows)))
    rest, (outer, inner) = code.loops(instructions, spans)
    assert [x.name for x in rest] == ["S2R", "EXIT", "BRA"]
    assert code.counts(outer.own) == code.Counts(slots=3, special=1, fp64=1)
    flops = 2 * 64 * 64 * 16 / 4  # a warp's
    assert code.counts(inner.own) == code.Counts(slots=4, flops=flops, waits=1, barriers=1)


def test_a_wait_for_memory_is_no_loop():
    rows = [".L_x_1:", FIRST, ".L_x_2:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3+URZ], R1"]
    rows += ["@!P1 BRA `(.L_x_2)", "@P0 BRA `(.L_x_1)", "EXIT"]
    instructions, spans = code.parse(code.function(machine_code(*rows)))
    (loop,) = code.loops(instructions, spans)[1]
    assert code.counts(loop.own).waits == 1 and len(loop.own) == 4


IR = """
#loc = loc("/a/walk.py":3:1)
#loc1 = loc("/a/walk.py":7:5)
#loc2 = loc("x"(#loc1))
module {
  tt.func public @k(%x: !tt.ptr<bf16> loc("x"(#loc)), %of.y: !tt.ptr<f32> loc("y"(#loc)), %T: i32) {
    %c1 = arith.constant 1 : i32 loc(#loc1)
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %c16 = arith.constant 16 : i32 loc(#loc1)
    %p = tt.get_program_id x : i32 loc(#loc)
    %n = arith.ceildivsi %T, %c16 : i32 loc(#loc)
    %r:2 = scf.for %i = %c0 to %n step %c1 iter_args(%q = %x, %a = %c0) -> (!tt.ptr<bf16>, i32)  : i32 {
      %s = tt.splat %q : !tt.ptr<bf16> -> tensor<16x32x!tt.ptr<bf16>> loc(#loc2)
      %v = tt.load %s : tensor<16x32x!tt.ptr<bf16>> loc(#loc2)
      %m = scf.for %j = %c0 to %i step %c1 iter_args(%b = %c0) -> (i32)  : i32 {
        scf.yield %b : i32 loc(#loc1)
      } loc(#loc1)
      %f = arith.cmpi eq, %p, %c0 : i32 loc(#loc1)
      scf.if %f {
        tt.store %of.y, %c1 : !tt.ptr<f32> loc(#loc1)
      } loc(#loc1)
      scf.yield %q, %a : !tt.ptr<bf16>, i32 loc(#loc1)
    } loc(#loc1)
    %w = scf.while (%k = %p) : (i32) -> i32 {
      %go = arith.cmpi slt, %k, %n : i32 loc(#loc1)
      scf.condition(%go) %k : i32 loc(#loc1)
    } do {
    ^bb0(%k: i32 loc("k"(#loc1))):
      %k1 = arith.addi %k, %c1 : i32 loc(#loc1)
      scf.yield %k1 : i32 loc(#loc1)
    } loc(#loc1)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""


def test_loops_are_gone_through_as_often_as_their_bounds_say():
    arguments = {"x": trips.Pointer("x"), "of.y": trips.Pointer("of.y"), "T": 157}
    walk = trips.walked(IR, arguments, (8, 1, 1))
    assert [loop.times for loop in walk.loops] == [
        10,
        10 * 5,
        6,
    ]  # of the middle program, 4; and iteration, 5
    assert walk.read == {"x": 10 * 16 * 32 * 2} and walk.written == {"of.y": 0}
    assert trips.walked(IR, arguments, (1, 1, 1)).written == {"of.y": 10 * 4}
    assert ("walk.py", 7) in walk.loops[0].lines


def test_a_multiprocessor_has_as_many_programs_as_registers_warps_and_memory_allow():
    assert model.occupancy(90, registers=255, warps=8, shared=32 << 10) == 1
    assert model.occupancy(90, registers=168, warps=4, shared=0) == 3
    assert model.occupancy(90, registers=32, warps=1, shared=0) == 32
    assert model.occupancy(90, registers=32, warps=16, shared=0) == 4
    assert model.occupancy(80, registers=32, warps=4, shared=54 << 10) == 2


def test_a_launch_takes_as_long_as_its_slowest_part():
    limits = model.H200
    one = model.Launched(code.Counts(), warps=1, programs=132, bytes=0)
    bytes = one._replace(bytes=limits.copy)
    products = one._replace(counts=code.Counts(flops=limits.matmul / 132))
    special = one._replace(counts=code.Counts(special=limits.special / 132 / 32))
    slots = one._replace(counts=code.Counts(slots=limits.clock), warps=4)
    for name, launch in {"bytes": bytes, "products": products, "special": special, "slots": slots}.items():
        assert model.predicted([launch], [], limits) == (pytest.approx(1), name)
        if name != "bytes":  # one program more is one more for a multiprocessor, for which all wait
            assert model.predicted([launch._replace(programs=133)], [], limits)[0] == pytest.approx(2)
    assert model.predicted([bytes, special], [limits.copy], limits)[0] == pytest.approx(3)
