"""Any family by any method to any sizes in any order: what is promised lossless is, and nothing else."""

from dataclasses import fields
from random import Random

import pytest
import torch
from checkpoints import ALL
from fitting import ADDED, CHOICES, some
from outputs import error, run

import growth
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.loading import quiet
from growth.methods import METHODS
from growth.plan import Source
from growth.sizes import sizes_of

SEEDS, DRAWS = range(4), 6
# Those that learn take data, msg's model is its source behind masks, mixtures have tests of their own.
NAMES = [name for name in METHODS if name not in ("ligo", "mango", "gradmax", "msg", "upcycle")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """name -> the folder of such a checkpoint in float64 and what it gives."""
    made = {}

    def make(name):
        if name not in made:
            with quiet():
                folder = ALL[name](tmp_path_factory.mktemp("source") / "src", torch.float64)
            made[name] = folder, run(folder, torch.float64)[1]
        return made[name]

    return make


def drawn(random, folder):
    """A method and sizes, often such that whole factors of all of them are asked for."""
    have, name = sizes_of(Source(Checkpoint(folder)).model), random.choice(NAMES)
    known = {field.name for field in fields(METHODS[name])}
    options = some(random, {x: CHOICES[x] for x in CHOICES if x in known}, 0.7)
    if name in ADDED:
        options["added"] = random.choice(ADDED[name])
    if random.random() < 0.4:
        order = [*range(have.layers), *(random.randrange(have.layers) for _ in range(random.randint(0, 3)))]
        options["order"] = sorted(order) if random.random() < 0.6 else order
    whole, sizes = random.random() < 0.6, {}
    each = {"hidden_size": (have.hidden, 0.8, 16), "ffn_size": (have.ffn, 0.3, 1)}
    each |= {"num_heads": (have.heads, 0.2, 1), "num_kv_heads": (have.kv_heads, 0.2, 1)}
    for size, (now, often, unit) in each.items():
        if now and random.random() < often:
            sizes[size] = now * random.choice((1, 2, 3)) if whole else now + unit * random.randint(0, 6)
    if "order" not in options and random.random() < 0.5:
        sizes["num_layers"] = random.choice((have.layers + 1, have.layers + 2, 2 * have.layers))
    return METHODS[name], options, sizes


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_promised_lossless_is_and_what_is_not_promised_is_not(source, tmp_path, seed):
    random, grown = Random(seed), 0
    while grown < DRAWS:
        name = random.choice([*ALL])
        folder, truth = source(name)
        kind, options, sizes = drawn(random, folder)
        told, dst = f"{name}: {kind.__name__}(**{options}), {sizes}", tmp_path / str(grown)
        try:
            report = growth.grow(folder, dst, method=kind(**options), allow_lossy=True, **sizes)
        except Refusal as refusal:
            assert "\n" not in str(refusal) and "; " in str(refusal) and not dst.exists(), told
            continue
        grown += 1
        apart = error(truth, run(dst, torch.float64)[1])
        assert apart < 1e-9 if report.lossless else apart > 1e-7, f"{told}: {apart}, {report.notes}"
        assert report.lossless == (not report.notes), told
