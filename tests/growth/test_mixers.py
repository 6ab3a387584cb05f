"""How mixers start from attention: each by its equation, computed another way; and least squares."""

import pytest
import torch
import torch.nn.functional as F
from decoders import DECODERS

import growth
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.loading import quiet
from growth.plan import Source
from growth.training.data import Windows
from growth.transferring.mixers import Ridge, regrouped
from growth.transferring.starting import Starting
from lcikernels.layers.retention import retnet_log_decay

CPU = torch.device("cpu")
HEADS = ("gpt_neox", "llama with biases, tied", "qwen3", "olmo2", "gemma2", "gpt2", "smollm3")


def started(folder, name, letter="R", heads=None, layer=1, copy="all", start=None):
    """A layer of such a source, its attention, and the mixer that starts from it; all in float64."""
    with quiet():
        source = Source(Checkpoint(DECODERS[name](folder / "src", torch.float64)))
    fields = {}
    if heads is not None:
        own = Starting(source, letter * 3, {}, None, "all", 0, False).old
        width = own.num_attention_heads * own.head_dim
        fields = {"retention_num_heads": heads, "retention_num_kv_heads": heads}
        fields |= {"retention_head_dim": width // heads}
    starting = Starting(source, letter * 3, fields, start, copy, 0, False)
    old, new = starting.layers(CPU)
    block = old.block(layer)
    own = new.with_mixer(layer, block)
    starting.begin(layer, own.mixer, block.mixer)
    return starting, new, block, own


def test_pairs_that_rotate_come_first_and_values_keep_their_order():
    """Two heads of 4, of which dims 0 and 1 rotate, become one of which 4 do."""
    rows = regrouped(2, 1, 4, 1, 1, 2)
    assert rows.q.tolist() == [0, 4, 1, 5, 2, 3, 6, 7]
    assert rows.k.tolist() == [0, 0, 1, 1, 2, 3, 2, 3]  # the one head of keys, read twice
    assert rows.v.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    apart = regrouped(1, 1, 8, 2, 2, 1)  # pairs (0, 2), (1, 3)
    assert apart.q.tolist() == [0, 2, 4, 5, 1, 3, 6, 7]
    assert apart.v.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("name", ["gpt_neox", "llama with biases, tied", "gpt2"])
def test_a_retention_with_other_heads_is_what_its_equation_says(tmp_path, name, heads):
    """Scores of heads that become one add up, each pair turned at its place among the new ones."""
    starting, new, block, own = started(tmp_path, name, heads=heads)
    config, attention, mixer = starting.old, block.mixer, own.mixer
    T, H, K = 12, config.num_attention_heads, config.head_dim
    x = torch.randn(2, T, config.hidden_size, dtype=torch.float64)
    q, k, v = (F.linear(x, p.weight, p.bias) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    group = H // config.num_key_value_heads
    q = q.unflatten(-1, (H, K))
    k, v = (y.unflatten(-1, (-1, K)).repeat_interleave(group, 2) for y in (k, v))
    turning = starting.old.rotary_dims["A"] // 2
    rates = 10000.0 ** (-2 * torch.arange(64, dtype=torch.float64) / starting.config.rotary_dims["R"])
    r, parts = max(1, H // heads), max(1, heads // H)
    far = torch.arange(T)[:, None] - torch.arange(T)
    scores = torch.zeros(2, heads, T, T, dtype=torch.float64)
    for h in range(H):
        for i in range(turning):
            a, b = q[:, :, h, [i, i + turning]], k[:, :, h, [i, i + turning]]
            a, b = torch.view_as_complex(a.contiguous()), torch.view_as_complex(b.contiguous())
            place, to = (r * i + h % r, h // r) if parts == 1 else (i // parts, h * parts + i % parts)
            turned = a[:, :, None] * b[:, None].conj() * torch.exp(1j * rates[place] * far)
            scores[:, to] += turned.real
        rest = range(2 * turning, K)
        for n, i in enumerate(rest):
            to = h // r if parts == 1 else h * parts + n // (len(rest) // parts)
            scores[:, to] += q[:, :, None, h, i] * k[:, None, :, h, i]
    decays = retnet_log_decay(heads).double()
    scores = scores * (decays[:, None, None] * far).exp().tril() * (H * K // heads) ** -0.5
    o = torch.einsum("bhts,bshd->bthd", scores, v.reshape(2, T, heads, -1))
    o = o * (o.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt()
    g = F.silu(F.linear(x, mixer.g_proj.weight, mixer.g_proj.bias))
    wanted = F.linear(o.flatten(2) * g, attention.o_proj.weight, attention.o_proj.bias)
    got = mixer(x)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())
    assert starting.lost()


@pytest.mark.parametrize("name", HEADS)
def test_with_the_source_s_heads_q_k_and_v_are_the_source_s(tmp_path, name):
    """Shared keys and values stay shared, norms of q and k stay."""
    starting, _, block, own = started(tmp_path, name)
    x = torch.randn(2, 7, starting.old.hidden_size, dtype=torch.float64)
    a, b = block.mixer, own.mixer
    for part in "qkv":
        old, new = (getattr(m, f"{part}_proj")(x) for m in (a, b))
        if part != "v":
            size = a.head_dim
            old, new = (
                getattr(m, f"{part}_norm")(y.unflatten(-1, (-1, size))) for m, y in ((a, old), (b, new))
            )
        assert torch.equal(old, new)
    assert torch.equal(a.o_proj.weight, b.o_proj.weight)
    assert not starting.made(1)  # nothing but copies


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "gemma3_text"])
def test_gains_of_q_and_k_follow_their_dims_into_other_heads(tmp_path, name):
    _, _, block, own = started(tmp_path, name, heads=2)
    x = torch.randn(2, 7, block.mixer.q_proj.in_features, dtype=torch.float64)
    a, b = block.mixer, own.mixer
    for part in "qk":
        old = getattr(a, f"{part}_proj")(x).unflatten(-1, (-1, a.head_dim))
        old = old * getattr(a, f"{part}_norm").weight.unflatten(0, (-1, a.head_dim))
        if part == "k":
            old = old.repeat_interleave(a.num_key_value_groups, 2)
        new = getattr(b, f"{part}_proj")(x).unflatten(-1, (2, -1))
        new = new * getattr(b, f"{part}_norm").weight.unflatten(0, (-1, new.shape[-1]))
        assert torch.allclose(old.flatten(2).sort(-1).values, new.flatten(2).sort(-1).values)


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "qwen2", "gpt2"])
def test_mamba_2_reads_q_as_c_k_as_b_and_v_as_x(tmp_path, name):
    starting, new, block, own = started(tmp_path, name, "S", start="attention")
    a, mixer = block.mixer, own.mixer
    x = torch.randn(2, 7, a.q_proj.in_features, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (-1, a.head_dim)) for p in (a.q_proj, a.k_proj, a.v_proj))
    k, v = (y.repeat_interleave(a.num_key_value_groups, 2) for y in (k, v))
    wanted = F.silu(torch.cat((v, k, q), 2).flatten(2))
    _, u, _ = mixer.in_proj(x).split(mixer.projected, -1)
    assert torch.allclose(mixer.conv1d(u, None, None, None)[0], wanted)
    assert torch.equal(mixer.out_proj.weight, a.o_proj.weight)
    assert mixer(x).isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
def test_ridge_is_the_least_squares_solution(bias):
    """Of the rows and, for the penalty, sqrt(lambda) W = 0; in any batches."""
    y, o = torch.randn(50, 6, dtype=torch.float64) + 1, torch.randn(50, 3, dtype=torch.float64)
    ridge = Ridge(6, 3, bias, strength=0.1)
    for rows in (slice(0, 13), slice(13, 50)):
        ridge.add(y[rows].float().double(), o[rows])
    y = y.float().double()
    centred = y - y.mean(0) if bias else y
    penalty = (0.1 * centred.square().sum() / 6).sqrt() * torch.eye(6, dtype=torch.float64)
    A, rhs = torch.cat((y, penalty)), torch.cat((o, torch.zeros(6, 3, dtype=torch.float64)))
    if bias:
        A = torch.cat((A, torch.cat((torch.ones(50, 1), torch.zeros(6, 1)))), 1)
    wanted = torch.linalg.lstsq(A, rhs).solution.mT
    W, b = ridge.solve()
    assert torch.allclose(W, wanted[:, :6])
    assert torch.allclose(b, wanted[:, 6]) if bias else b is None


def test_a_start_without_data_streams_into_the_checkpoint(tmp_path):
    starting, new, _, own = started(tmp_path, "llama", heads=2)
    report = growth.transfer(tmp_path / "src", tmp_path / "out", copy="all", retention_heads=2)
    out = Checkpoint(tmp_path / "out")
    for name, x in own.mixer.state_dict().items():
        assert torch.equal(out.read(f"model.layers.1.mixer.{name}"), x), name
    rows = {row.name: row for row in report.plan.rows}
    q, o = (rows[f"model.layers.1.mixer.{part}_proj.weight"] for part in "qo")
    assert q.origin == "regrouped" and q.sources == ("model.layers.1.self_attn.q_proj.weight",)
    assert o.origin == "copied" and report.plan.dropped == {}
    assert "adds up the scores of 2" in report.notes[-1]


def test_mamba_2_from_attention_is_a_checkpoint_that_trains_on(tmp_path):
    with quiet():
        DECODERS["llama"](tmp_path / "src")
        growth.transfer(tmp_path / "src", tmp_path / "out", mixers="mamba2", start="attention")
        text = Windows(torch.arange(61).repeat(20), 16)
        report = growth.train(tmp_path / "out", text, tmp_path / "trained", steps=2, batch_size=4)
    assert report.curve[-1].loss > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": "random"}, "start: expected one of published, attention, got random"),
        ({"mixers": "mamba", "start": "attention"}, "start: expected published for Mamba"),
        (
            {"start": "attention", "copy": "mlp"},
            "start: expected published, where copy mlp makes mixers fresh",
        ),
        (
            {"start": "attention", "retention_heads": 64},
            "retention-heads: expected parts of a head whose 2 pairs",
        ),
    ],
)
def test_starts_that_do_not_exist_are_refused(tmp_path, options, message):
    with quiet():
        DECODERS["gpt_neox"](tmp_path / "src")
    with pytest.raises(Refusal, match=message):
        growth.transfer(tmp_path / "src", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
