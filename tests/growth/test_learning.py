"""Growth that is learned: where it starts, what learns, what it keeps in memory, where it ends."""

import json
from dataclasses import replace

import pytest
import torch
from checkpoints import ALL, FAMILIES, WIDE, bert, neox, pico
from memory import Memory
from safetensors.torch import save_file
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

import growth
from growth.checkpoint import Checkpoint
from growth.engine import made, plan_growth
from growth.errors import Refusal
from growth.learned.expansion import Expansion
from growth.learned.fit import fit, step_flops
from growth.learned.maps import LearnedMaps, dense
from growth.learned.memory import free, kept
from growth.loading import load_model
from growth.lossless import lost
from growth.methods import Lemon, Ligo, Mango, method_of
from growth.plan import Source
from growth.sizes import Sizes, resized
from growth.targets import scale_eps
from growth.training.data import Windows
from growth.training.flops import count_flops

SIZES = {
    "wider and deeper": (144, 5),
    "twice as wide": (192, 3),
    "more than twice in both": (264, 8),
    "depth alone": (96, 4),
}


class Grown:
    """A checkpoint, the model it is to become, and the means to expand it."""

    def __init__(self, folder, hidden_size, num_layers):
        self.folder = folder
        self.source = Source(Checkpoint(folder))
        model = self.source.model
        config = resized(model, Sizes(hidden_size, num_layers), Lemon().layers)
        self.target = model.family.model(config, model.parts)
        self.old, self.new = model.architecture, self.target.architecture

    def expansion(self, operator):
        return Expansion(operator, self.source, self.target)

    def ligo(self, learn=("*",), **options):
        method = Ligo(learn=learn, **options)
        maps = method.maps(self.old, self.new)
        scale_eps(self.target.config, maps)
        return self.expansion(LearnedMaps(maps, self.source, learn))

    def mango(self, **options):
        method = Mango(**options)
        maps = method.maps(self.old, self.new)
        return self.expansion(method.operator(self.source, self.old, self.new, maps, seed=0))

    def away(self, expansion):
        """The largest difference of its logits from the source's."""
        expansion.large[0].eval()
        ids = tokens() % self.source.config.vocab_size
        with torch.no_grad():
            truth = load_model(self.folder).eval()(ids).logits
            return (expansion(ids).logits - truth).abs().max().item()


def shallow(family, folder, dtype=torch.float32):
    """A source of two layers whose feed-forward blocks Mango can read."""
    sizes = {"n_inner": 192, "n_layer": 2}
    if family != "gpt2":
        sizes = {"intermediate_size": 192, "num_hidden_layers": 2}
    return FAMILIES[family](folder, dtype, **sizes)


def tokens(B=2, T=32):
    return torch.randint(256, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.covering("pairs")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", ["lossless", "net2net", "published"])
@pytest.mark.parametrize("name, tied", [*((name, False) for name in SIZES), ("wider and deeper", True)])
def test_ligo_starts_where_it_says(tmp_path, family, start, tied, name):
    hidden_size, num_layers = SIZES[name]
    src = FAMILIES[family](tmp_path / "src", tie_word_embeddings=tied)
    model = Grown(src, hidden_size, num_layers)
    if start == "lossless" and family == "bert" and hidden_size % 96:
        with pytest.raises(
            Refusal, match="start: expected net2net or published, .*norm: the mean and variance"
        ):
            model.ligo(start=start)
        return
    expansion = model.ligo(start=start)
    lossless = not lost(model.old, model.new, expansion.operator.start)
    assert lossless or start != "lossless"
    away = model.away(expansion)
    assert away < 1e-4 if lossless else away > 1e-2


@pytest.mark.parametrize("hidden_size", [112, 128])
@pytest.mark.parametrize("name", ["gemma", "gemma3_text", "olmo2", "phi3", "lci RRR", "lci MMM", "lci SSS"])
def test_families_of_other_frames_start_as_the_source(tmp_path, name, hidden_size):
    """Gemma multiplies embeddings by the root of the width; OLMo-2's added heads mix what others do."""
    model = Grown(ALL[name](tmp_path / "src"), hidden_size, 4)
    assert model.away(model.ligo()) < 1e-4


def test_a_head_that_is_made_before_the_embeddings_that_it_shares_starts_as_the_source(tmp_path):
    src = pico(XLMRobertaForMaskedLM, XLMRobertaConfig, **WIDE)(tmp_path / "src")
    model = Grown(src, 2 * WIDE["hidden_size"], 4)
    assert model.away(model.ligo()) < 1e-4


@pytest.mark.parametrize("ties", ["published", "untied"])
def test_the_published_ties_make_one_map_of_the_stream_and_readers_of_producers(tmp_path, ties):
    old, new = vars_of(bert(tmp_path / "src"), 120, 4)
    maps = Ligo(start="published", ties=ties).maps(old, new).wires
    names = ("residual", "gain", "transform", "final_gain", "final")
    stream = {id(maps[name].written) for name in names}
    assert len(stream) == (1 if ties == "published" else len(names))
    assert (maps["ffn.0"].taken is maps["ffn.0"].written) == (ties == "published")
    assert (maps["mixed.0"].taken is maps["value.0"].written) == (ties == "published")
    assert maps["ffn.0"].written is not maps["ffn.1"].written


def vars_of(folder, hidden_size, num_layers):
    model = Grown(folder, hidden_size, num_layers)
    return model.old, model.new


@pytest.mark.covering("pairs")
@pytest.mark.parametrize("name", ["depth alone", "more than twice in both"])
@pytest.mark.parametrize("method", ["stack", "interpolate", "net2net"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_operators_before_ligo_are_ligo_with_particular_maps(tmp_path, family, method, name):
    """Proposition 1 of the paper, to the bit."""
    model = Grown(FAMILIES[family](tmp_path / "src"), *SIZES[name])
    maps = type(method_of(method))(noise=0.0).maps(model.old, model.new)
    wires = {name: dense(of, of.sources * of.width) for name, of in maps.wires.items()}
    learned = model.expansion(LearnedMaps(replace(maps, wires=wires), model.source, ()))
    for row, blocks in made(plan_growth(model.source, model.target, maps, seed=0), model.source):
        (own,) = learned.recipe(row.name)(model.source)
        assert torch.equal(own, torch.cat([*blocks]) if row.shape else next(blocks)), row.name


@pytest.mark.parametrize("operator", ["ligo", "mango"])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_make_their_weights_have_the_gradients_of_a_model_that_holds_them(
    tmp_path, family, operator
):
    """Embeddings and head in two steps, checkpoints: none of it changes what is computed."""
    model = Grown(shallow(family, tmp_path / "src"), 144, 3)
    made = model.ligo(start="published") if operator == "ligo" else model.mango(rank=2)
    made.double()
    made.large[0].eval()
    ids = tokens()
    loss = made(ids, ids).loss
    got = torch.autograd.grad(loss, [*made.parameters()])

    held = model.target.auto.from_config(model.target.config).double().eval()
    weights = {}
    for name, (entry, layer) in made.table.items():
        weights[made.memory_name[name]] = made._made({name: entry}, layer)[name]
    truth = functional_call(held, weights, (), {"input_ids": ids, "labels": ids}).loss
    assert loss.item() == pytest.approx(truth.item(), abs=1e-12)
    for x, y in zip(got, torch.autograd.grad(truth, [*made.parameters()]), strict=True):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("operator", ["ligo", "mango"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_that_holds_what_it_makes_has_the_same_gradients_and_fewer_operations(
    tmp_path, family, operator
):
    model = Grown(shallow(family, tmp_path / "src"), 144, 3)
    made = model.ligo(start="published") if operator == "ligo" else model.mango(rank=2)
    made.double()
    made.large[0].config._attn_implementation = "eager"
    found, operations = [], []
    for made.remakes in (True, False):
        torch.manual_seed(0)  # of dropout
        loss = made(tokens(), tokens()).loss
        found.append((loss, *torch.autograd.grad(loss, [*made.parameters()])))
        operations.append(count_flops(made, {"input_ids": tokens(), "labels": tokens()}))
    for x, y in zip(*found, strict=True):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-12)
    assert operations[1] < 0.85 * operations[0]


@pytest.mark.parametrize("remake", ["auto", "always", "never"])
@pytest.mark.parametrize("room", [0, 2**40])
def test_a_step_makes_nothing_twice_where_memory_holds_it_unless_told(
    source, text, monkeypatch, remake, room
):
    monkeypatch.setattr("growth.learned.memory.free", lambda device: room)
    expansion = Grown(source, 144, 5).ligo()
    windows = Windows(torch.tensor(list(text.read_bytes())), 32)
    how = {"name": "ligo", "seed": 0, "steps": 1, "batch_size": 2, "learning_rate": 1e-3, "remake": remake}
    flops, _ = fit(expansion, windows, **how)
    assert expansion.remakes == {"auto": room == 0, "always": True, "never": False}[remake]
    assert flops == step_flops(expansion.requires_grad_(), windows, 2, torch.device("cpu"))


def test_what_a_step_holds_is_as_much_as_memory_is_seen_to_fill(source, text):
    """On one example and on two; beside the small model, which is there before."""
    expansion = Grown(source, 144, 5).ligo()
    windows = Windows(torch.tensor(list(text.read_bytes())), 32)
    there = [*expansion.parameters(), *expansion.buffers()]
    for B in (1, 2):
        batch, expansion.remakes = windows.batch([0] * B), False
        with Memory([*there, *batch.values()]) as memory:
            loss = expansion(**batch).loss
            held = sum(memory.sizes.values())
        assert loss.isfinite() and expansion.remakes is False
        assert held * 0.8 < kept(expansion, batch) < held * 1.2


def test_a_container_s_memory_counts_where_it_is_less(tmp_path, monkeypatch):
    monkeypatch.setattr("growth.learned.memory.CGROUP", tmp_path)
    whole = free(torch.device("cpu"))
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free(torch.device("cpu")) > 2**20 and whole > 2**20
    (tmp_path / "memory.max").write_text("1500000\n")
    assert free(torch.device("cpu")) == 500000


@pytest.mark.parametrize("operator", ["ligo", "mango"])
def test_autocast_multiplies_in_16_bits_and_leaves_parameters_and_gradients_in_float32(tmp_path, operator):
    model = Grown(neox(tmp_path / "src", intermediate_size=192), 144, 5)
    made = model.ligo(start="published") if operator == "ligo" else model.mango()
    ids = tokens()
    exact = made(ids, ids).loss
    with torch.autocast("cpu", torch.bfloat16), ProductDtypes() as seen:
        loss = made(ids, ids).loss
        loss.backward()
    assert loss.item() == pytest.approx(exact.item(), abs=0.05) and loss.item() != exact.item()
    assert seen.dtypes == {torch.bfloat16}
    assert all(x.grad.dtype == torch.float32 for x in made.parameters() if x.grad is not None)
    with torch.no_grad():
        assert made(ids, ids).loss.item() == pytest.approx(exact.item(), abs=1e-6)


@pytest.mark.parametrize("operator", ["ligo", "mango"])
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_leaves_vectors_and_the_stream_of_embeddings_in_float32(tmp_path, family, operator):
    model = Grown(shallow(family, tmp_path / "src"), 144, 3)
    made = model.ligo(start="published") if operator == "ligo" else model.mango()
    large, streams = made.large[0], []
    large.get_input_embeddings().register_forward_hook(lambda module, inputs, out: streams.append(out))
    weights = [*model.old.layered.values()]
    with torch.autocast("cpu", torch.bfloat16):
        made(tokens())
        vectors = [x for x in made.operator.wide(weights, 0) if x.ndim == 1]
    assert {x.dtype for x in vectors + streams} == {torch.float32} and streams


class ProductDtypes(TorchDispatchMode):
    """What kronecker_expand is given."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function is torch.ops.lcikernels.kronecker_expand.default:
            self.dtypes |= {x.dtype for x in arguments if isinstance(x, torch.Tensor)}
        return function(*arguments, **(named or {}))


def test_a_step_makes_no_matrix_of_the_vocabulary(tmp_path):
    expansion = Grown(neox(tmp_path / "src", vocab_size=5000), 144, 5).ligo()
    ids = tokens(1, 16)
    with Memory() as memory:
        expansion(ids, ids).loss.backward()
    table = 5000 * 96 * 4  # the small one, that the head's product sees turned
    assert max(memory.made) == table and memory.made.count(table) == 1


@pytest.mark.parametrize("start", ["lossless", "published"])
@pytest.mark.parametrize("family", ["gpt_neox", "bert"])
def test_a_step_takes_less_memory_than_training_the_large_model(tmp_path, family, start):
    """Weights, gradients, Adam's moments and what forward and backward hold at most."""
    src = FAMILIES[family](tmp_path / "src", intermediate_size=384)
    model = Grown(src, 192, 6)
    large = model.target.auto.from_config(model.target.config)
    ids = tokens(4, 32)
    taken = []
    for network in (model.ligo(start=start), large):
        with Memory([*network.parameters(), *network.buffers()]) as memory:
            network(input_ids=ids, labels=ids).loss.backward()
        taken.append(memory.most + 2 * sum(x.numel() * 4 for x in network.parameters()))
    assert taken[0] < taken[1]


def test_operations_counted_on_two_windows_are_those_of_a_batch(source, text):
    expansion = Grown(source, 144, 5).ligo()
    windows = Windows(torch.tensor(list(text.read_bytes())), 32)
    whole = count_flops(expansion, windows.batch(range(6)))
    assert step_flops(expansion, windows, 6, torch.device("cpu")) == whole


@pytest.mark.parametrize("method, sizes", [("ligo", (96, 3)), ("ligo", (192, 2)), ("mango", (192, 3))])
def test_a_dry_run_plans_what_the_run_records(tmp_path, text, method, sizes):
    src = shallow("gpt_neox", tmp_path / "src")
    planned = growth.grow(src, None, Sizes(*sizes), method, dry_run=True).plan
    kind = type(method_of(method))
    growth.grow(src, tmp_path / "out", Sizes(*sizes), kind(data=text, steps=1, batch_size=2))
    record = Checkpoint(tmp_path / "out").record()
    assert record["tensors"] == json.loads(json.dumps(planned.json()))["tensors"]
    assert record["sequence_length"] == 32
    assert record["data"].startswith(f"{text.stat().st_size // 32} windows, ")
    # What does not grow does not learn with LiGO: embeddings, the last norm and the head.
    assert planned.origins()["copied"] == (4 if method == "ligo" and sizes[0] == 96 else 0)


@pytest.mark.parametrize("method", ["ligo", "mango"])
def test_a_checkpoint_in_float64_learns_in_float32(tmp_path, text, method):
    src = shallow("gpt_neox", tmp_path / "src", torch.float64)
    kind = type(method_of(method))
    growth.grow(src, tmp_path / "out", Sizes(layers=3), kind(data=text, steps=1, batch_size=2))
    assert Checkpoint(tmp_path / "out").read("embed_out.weight").dtype == torch.float64


@pytest.mark.parametrize("operator", ["ligo", "mango"])
def test_what_was_learned_is_what_is_written(tmp_path, operator):
    model = Grown(neox(tmp_path / "src", intermediate_size=192), 144, 5)
    expansion = model.ligo() if operator == "ligo" else model.mango()
    with torch.no_grad():
        for parameter in expansion.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    expansion.large[0].eval()
    ids = tokens()
    learned = expansion(ids).logits
    expansion.requires_grad_(False)
    model.target.config.save_pretrained(tmp_path / "out")
    tensors = {name: next(expansion.recipe(name)(model.source)).contiguous() for name in expansion.table}
    save_file(tensors, tmp_path / "out/model.safetensors")
    written = load_model(tmp_path / "out").eval()(ids).logits
    torch.testing.assert_close(written, learned, rtol=1e-4, atol=1e-4)


def test_only_what_is_asked_for_learns(source, text):
    def learning(*patterns, sizes=(144, 5)):
        expansion = Grown(source, *sizes).ligo(patterns)
        return {name for name, x in expansion.operator.named_parameters() if x.requires_grad}

    assert learning("depth.*") == {name for name in learning("*") if name.startswith("depth.")}
    assert learning("write.ffn.*", "read.mixed.0") == {
        *(f"wires.ffn/{i}.written" for i in range(5)),
        "wires.mixed/0.taken",
    }
    assert all(name.startswith("depth.") for name in learning("*", sizes=(96, 5)))
    assert all(name.startswith("wires.") for name in learning("*", sizes=(144, 3)))
    with pytest.raises(Refusal, match=r"learn: expected patterns of maps: depth.\*, read.\*, .* got weight"):
        learning("weight")


def test_nothing_learns_to_read_a_wire_that_nothing_reads(source):
    wires = Grown(source, 144, 5).ligo().operator.start.wires
    unread = {name.partition(".")[0] for name, of in wires.items() if of.taken is None}
    assert unread == {"residual", "gain", "query", "key", "value", "final_gain"}


@pytest.mark.parametrize("operator", ["ligo", "mango"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_learns_has_a_gradient_after_a_few_steps(tmp_path, family, operator):
    model = Grown(shallow(family, tmp_path / "src"), 192, 3)
    expansion = model.ligo() if operator == "ligo" else model.mango(rank=2)
    optimizer = torch.optim.Adam(expansion.parameters(), 1e-2)
    ids = tokens(4)
    for _ in range(4):  # readers, then the writers of what they read, then what the added layers hold inside
        optimizer.zero_grad()
        expansion(ids, ids).loss.backward()
        optimizer.step()
    idle = [name for name, x in expansion.named_parameters() if x.grad is None or not x.grad.any()]
    assert not idle


@pytest.mark.parametrize(
    "family, options",
    [*((family, {"start": "lossless"}) for family in FAMILIES)]
    + [("gpt_neox", {"start": "published"}), ("bert", {"rank": 1})]
    + [("gpt2", {"learn": ("read.*", "depth.*")})],
    ids=str,
)
def test_learning_lowers_the_loss_and_leaves_a_checkpoint(tmp_path, text, family, options):
    method = "mango" if "rank" in options else "ligo"
    src = shallow(family, tmp_path / "src")
    how = {"data": text, "learning_rate": 5e-3, "steps": 5, "batch_size": 4}
    kind = Ligo if method == "ligo" else Mango
    report = growth.grow(src, tmp_path / "learned", Sizes(hidden=192, layers=3), kind(**how, **options))
    assert not report.lossless and report.flops > 0
    made = Checkpoint(tmp_path / "learned")
    assert made.record()["steps"] == 5
    first, *_, last = made.record()["training_losses"]
    assert f"training loss of learning: {first:.3f} to {last:.3f}" in report.lines
    assert made.config.use_cache == Checkpoint(src).config.use_cache
    for row in report.plan.rows:
        copied = row.origin == "copied"
        assert not copied or torch.equal(made.read(row.name), Checkpoint(src).read(row.sources[0])), row
    model = Grown(src, 192, 3)
    options.pop("learn", None)
    start = model.ligo(**options) if method == "ligo" else model.mango(**options)
    start.large[0].eval()
    learned = load_model(tmp_path / "learned").eval()
    ids = torch.tensor([list(text.read_bytes()[:32])])
    with torch.no_grad():
        assert learned(ids, labels=ids).loss < start(ids, ids).loss - 0.1


def test_mango_is_the_ring_of_its_cores(tmp_path):
    model = Grown(bert(tmp_path / "src", intermediate_size=192), 144, 4)
    operator = model.mango(rank=2).operator.double()
    for core in operator.ring.values():
        torch.nn.init.normal_(core)
    read, write, layers, slots = (operator.ring[name] for name in ("read", "write", "layers", "slots"))
    weights = [weight for name, weight in model.old.layered.items() if name in operator.where]
    old = operator.old  # [L, B, D, D]
    expected = torch.einsum("tuml, urcb, lboi, stOo, rsIi -> mcOI", layers, slots, old, write, read)
    for layer in range(4):
        made = dict(zip((w.name for w in weights), operator.wide(weights, layer), strict=True))
        q, up, down = (made[f"layers.{{}}.{name}.weight"] for name in ("mixer.q", "mlp.up", "mlp.down"))
        of = expected[layer]
        torch.testing.assert_close(q, of[operator.where["layers.{}.mixer.q.weight"][0]])
        torch.testing.assert_close(up, of[list(operator.where["layers.{}.mlp.up.weight"])].flatten(0, 1))
        parts = of[list(operator.where["layers.{}.mlp.down.weight"])]
        torch.testing.assert_close(down, torch.cat([*parts], 1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hidden_size", [144, 192])
def test_mango_starts_as_net2net(tmp_path, family, hidden_size):
    sizes = {"n_inner": 192} if family == "gpt2" else {"intermediate_size": 192}
    model = Grown(FAMILIES[family](tmp_path / "src", **sizes), hidden_size, 5)
    away = model.away(model.mango(rank=2))
    assert away < 1e-4 if hidden_size == 192 else away > 1e-2


@pytest.mark.parametrize("family", ["gpt_neox", "bert"])
def test_mango_starts_from_the_order_that_it_is_given(tmp_path, family):
    model = Grown(shallow(family, tmp_path / "src"), 192, 4)
    given = model.mango(order=(0, 0, 0, 1))
    assert model.away(given) < 1e-4
    x = given.recipe(next(name for name, (entry, i) in given.table.items() if i == 2))
    other = model.mango().recipe(next(name for name, (entry, i) in given.table.items() if i == 2))
    assert not torch.equal(next(x(model.source)), next(other(model.source)))


@pytest.mark.parametrize("hidden_size", [144, 264])
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_the_lossless_start_is_lemon(tmp_path, family, hidden_size):
    """Its very numbers; but for the head's, whose wide matrix is never made."""
    model = Grown(FAMILIES[family](tmp_path / "src"), hidden_size, 5)
    made = model.ligo()
    maps = Lemon(noise=Ligo().noise).maps(model.old, model.new)
    lemon = plan_growth(model.source, model.target, maps, seed=0)
    for row in lemon.rows:
        if row.name not in ("embed_out.weight", "lm_head.weight"):
            (own,), truth = made.recipe(row.name)(model.source), torch.cat([*row.recipe(model.source)])
            torch.testing.assert_close(own, truth, rtol=1e-5, atol=1e-6, msg=row.name)
    assert made.operator.seed == 0 and made.operator.drawn == {}


@pytest.mark.parametrize("keeps", [True, False])
def test_numbers_that_were_drawn_are_kept_where_blocks_are(source, keeps):
    expansion = Grown(source, 144, 5).ligo()
    expansion.remakes = not keeps
    first, second = (expansion(tokens(), tokens()).loss.item() for _ in range(2))
    assert first == second and bool(expansion.operator.drawn) == keeps


def test_what_learns_refuses_what_it_cannot_do(source, text, tmp_path):
    def grow(method="ligo", hidden_size=None, dry_run=False, **options):
        kind = type(method_of(method))
        how = kind(**{"steps": 1, "data": text} | options)
        growth.grow(source, tmp_path / "out", Sizes(hidden_size, 4), how, dry_run=dry_run)

    foreign = Windows(torch.full((512,), 256), 32)
    for why, options in {
        "tokens below the model's 256, got 256": {"method": "ligo", "data": foreign},
        "start: expected one of lossless, net2net, published, got now": {"method": "ligo", "start": "now"},
        "remake: expected one of auto, always, never, got now": {"remake": "now"},
        "ties: expected one of published, untied, got knots": {"method": "ligo", "ties": "knots"},
        "ties: expected untied in the lossless start": {
            "method": "ligo",
            "ties": "published",
            "hidden_size": 144,
        },
        "ffn-size: expected the same whole multiple of the hidden size": {"method": "mango"},
        "ffn-size: .* choose method ligo$": {"method": "mango", "dry_run": True},
        "data: expected text that ligo learns from": {"method": "ligo", "data": None},
        "learning-rate: expected more than 0, and finite, got -1": {"method": "ligo", "learning_rate": -1},
        "learning-rate: expected one at which the loss stays finite": {
            "method": "ligo",
            "learning_rate": 1e30,
            "steps": 4,
        },
        "expected finite numbers in float32, got others; .* a learning rate that was too high": {
            "method": "ligo",
            "hidden_size": 144,
            "learning_rate": 1e30,
        },
        "learning-rate: expected more than 0, and finite, got inf": {
            "method": "ligo",
            "learning_rate": float("inf"),
        },
        "sequence-length: expected at least 2, got 1": {"method": "ligo", "sequence_length": 1},
        "one batch, 999 windows of 32 tokens, got 281": {
            "method": "ligo",
            "batch_size": 999,
        },
        "learn: expected patterns of maps: depth.*, got zzz": {
            "method": "ligo",
            "learn": ("zzz",),
            "dry_run": True,
        },
        "learn: expected maps that learn, got none": {"method": "ligo", "learn": ()},
        "sequence length: expected at most 32 tokens, the model's positions, got 33": {
            "method": "ligo",
            "sequence_length": 33,
        },
        "data: expected at most 32 tokens, the model's positions, got 64": {
            "method": "ligo",
            "data": Windows(torch.zeros(256, dtype=torch.int), 64),
        },
    }.items():
        with pytest.raises(Refusal, match=why):
            grow(**options)
    assert not (tmp_path / "out").exists()


def test_growth_is_the_work_of_one_process(source, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    with pytest.raises(Refusal, match="expected one process, got torchrun"):
        growth.grow(source, tmp_path / "out", method="lemon", num_layers=4)


@pytest.mark.parametrize("start", ["lossless", "published"])
def test_ligo_makes_no_map_of_the_vocabulary(source, start):
    old, new = vars_of(source, 120, 4)
    assert "vocab" not in Ligo(start=start).maps(old, new).wires


def test_the_large_model_follows_to_another_device(source):
    expansion = Grown(source, 120, 4).ligo().to("meta")
    large = expansion.large[0]
    used = [*expansion.parameters(), *expansion.buffers(), *large.buffers()]
    assert {x.device.type for x in used} == {"meta"} and len([*large.buffers()])


def test_learning_that_leads_up_says_what_to_lower(tmp_path, text):
    src = shallow("gpt_neox", tmp_path / "src")
    how = {"data": text, "learning_rate": 0.1, "steps": 5, "batch_size": 4}
    report = growth.grow(src, tmp_path / "learned", Sizes(hidden=192, layers=3), Ligo(**how))
    (line,) = (line for line in report.lines if "training loss of learning" in line)
    assert line.endswith("; it rose: choose a lower --learning-rate or --noise, or method lemon")
