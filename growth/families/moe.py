"""Mixtures of experts in Llama's frame: Mixtral, Qwen2-MoE and Qwen3-MoE.

    y = sum over the top_k experts e of weight_e down_e (silu(gate_e x) * up_e x),  weight = softmax(router x)

Mixtral divides the weights by their sum, Qwen's do where norm_topk_prob says so. Qwen2-MoE adds an expert
that every token has, times sigmoid(shared_gate x). Some of Qwen's layers may have a plain feed-forward block
(mlp_only_layers, decoder_sparse_step). Files hold each expert's matrices; transformers joins them in memory.
"""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from growth.architecture import Architecture, Experts, Linear, Op, Pointwise, Stack, Table, Wire
from growth.errors import refuse
from growth.families.frames import Frame, assembled
from growth.families.llama import BLOCK, HEAD_NORMS, attention_biases
from growth.families.stored import Stored, block
from growth.families.table import Family, Fields, Parts

EPS = "rms_norm_eps"
SPARSE, DENSE = "sparse", "dense"
Biases = Callable[[PreTrainedConfig], tuple[bool, bool, bool]]


def moe(
    model_type: str,
    modules: Mapping[str, str],
    fused: Mapping[str, str],
    *,
    ffn: str,
    biases: Biases = lambda config: (False, False, False),
    qk_norm: str = "",
    lists: tuple[str, ...] = (),
    memory: Mapping[str, str] | None = None,
) -> Family:
    """A family of this kind. ffn: the field that holds an expert's neurons."""

    def architecture(config: PreTrainedConfig, parts: Parts) -> Architecture:
        D = config.hidden_size
        frame = Frame(
            D,
            config.num_attention_heads,
            config.intermediate_size,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or D // config.num_attention_heads,
            biases=biases(config),
            qk_norm=qk_norm,
        )
        kinds = tuple(map(_kind, range(config.num_hidden_layers), [config] * config.num_hidden_layers))
        blocks = {DENSE: frame.feed_forward(), SPARSE: mixture(frame, config)}
        mixer = frame.block("mixer", frame.attention())
        blocks = {kind: (*mixer, *frame.block("mlp", blocks[kind])) for kind in sorted({*kinds})}
        ops = (
            Table("embed", "vocab", "residual"),
            frame.norm("norm", "residual", "final", "final_gain"),
            *frame.head(bool(config.tie_word_embeddings)),
        )
        # An expert's neurons first: theirs is the size of a feed-forward block.
        wires = expert_wires(config, ffn) | frame.wires() | {"vocab": Wire(config.vocab_size, fixed=True)}
        eps, deviation = {EPS: config.rms_norm_eps}, config.initializer_range
        return assembled(wires, ops, {"": Stack(kinds, blocks)}, eps, deviation)

    qwen = ffn != "intermediate_size"
    return Family(
        model_type,
        architecture,
        {
            "embed": Stored("model.embed_tokens"),
            "norm": Stored("model.norm"),
            "head": Stored("lm_head"),
            **block("model.layers.{}.", modules),
        },
        Fields(kv_heads="num_key_value_heads", head_dim="head_dim", ffn=ffn),
        accepts=accepts,
        lists=lists,
        layer_numbers=("mlp_only_layers",) if qwen else (),
        spelled=spelled if qwen else lambda config: {},
        resized=resized if qwen else lambda old, new: {},
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        memory=memory or {},
        fused=fused,
        ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    )


def mixture(frame: Frame, config: PreTrainedConfig) -> tuple[Op, ...]:
    """The router, the experts, and the expert of every token where there is one."""
    E, module = config.num_experts, frame.module("mlp")
    experts = [frame.feed_forward(f"mlp.experts.{e}", f"expert{e}.ffn") for e in range(E)]
    shared: tuple[Op, ...] = ()
    if hasattr(config, "shared_expert_intermediate_size"):
        gate = Linear(f"{module}.shared_gate", frame.reads, "shared_gate.{}")
        shared = (*frame.feed_forward("mlp.shared", "shared.ffn"), gate, Pointwise(("shared_gate.{}",)))
    return (
        Linear(f"{module}.router", frame.reads, "experts.{}"),
        *(op for ops in experts for op in ops),
        Experts(
            f"{module}.experts",
            "experts.{}",
            tuple(f"expert{e}.ffn.{{}}" for e in range(E)),
            config.num_experts_per_tok,
            getattr(config, "norm_topk_prob", True),
        ),
        *shared,
    )


def expert_wires(config: PreTrainedConfig, ffn: str) -> dict[str, Wire]:
    shared = getattr(config, "shared_expert_intermediate_size", 0)
    return {
        **{f"expert{e}.ffn.{{}}": Wire(getattr(config, ffn)) for e in range(config.num_experts)},
        "experts.{}": Wire(config.num_experts, fixed=True),
        "shared.ffn.{}": Wire(shared),
        "shared_gate.{}": Wire(1, fixed=True),
    }


def _kind(layer: int, config: PreTrainedConfig) -> str:
    listed = getattr(config, "mlp_only_layers", None) or ()
    return DENSE if layer in listed or (layer + 1) % getattr(config, "decoder_sparse_step", 1) else SPARSE


def accepts(config: PreTrainedConfig) -> None:
    experts, chosen = config.num_experts, config.num_experts_per_tok
    if experts < 1:
        raise refuse("num_experts", "at least 1", experts, "read it as the family without experts")
    if getattr(config, "decoder_sparse_step", 1) < 1:
        raise refuse("decoder_sparse_step", "at least 1", config.decoder_sparse_step, "set it to 1")
    if all(_kind(i, config) == DENSE for i in range(config.num_hidden_layers)):
        got = f"mlp_only_layers {config.mlp_only_layers}, decoder_sparse_step {config.decoder_sparse_step}"
        raise refuse("layers", "one with experts at least", got, "read it as the family without experts")
    shared = getattr(config, "shared_expert_intermediate_size", 1)
    for name, fits, expected, got in (
        ("num_experts_per_tok", 1 <= chosen <= experts, f"1 to the {experts} experts", chosen),
        ("shared_expert_intermediate_size", shared >= 1, "at least 1", shared),
    ):
        if not fits:
            raise refuse(name, expected, got, "no other model has a table")


def spelled(config: PreTrainedConfig) -> Mapping[str, Any]:
    """Every layer without experts by its number, for every other layer is another one in another order."""
    dense = [i for i in range(config.num_hidden_layers) if _kind(i, config) == DENSE]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def resized(old: PreTrainedConfig, new: PreTrainedConfig) -> Mapping[str, Any]:
    """The neurons of blocks that every token has, in proportion to the width."""
    names = ("intermediate_size", "shared_expert_intermediate_size")
    return {
        name: getattr(old, name) * new.hidden_size // old.hidden_size for name in names if hasattr(old, name)
    }


def _joined(gate: str, up: str, down: str, disk: str) -> dict[str, str]:
    """The names of experts' matrices on disk -> the parameters that transformers makes of all of them."""
    of = rf"(model\.layers\.\d+)\.{disk}\.experts\.\d+\."
    return {
        rf"{of}({gate}|{up})\.weight": r"\1.mlp.experts.gate_up_proj",
        rf"{of}{down}\.weight": r"\1.mlp.experts.down_proj",
    }


ATTENTION = {name: disk for name, disk in BLOCK.items() if not name.startswith("mlp.")}
MIXTRAL = moe(
    "mixtral",
    ATTENTION
    | {"mlp.router": "block_sparse_moe.gate"}
    | {
        f"mlp.experts.#.{name}": f"block_sparse_moe.experts.#.{disk}"
        for name, disk in {"gate": "w1", "up": "w3", "down": "w2"}.items()
    },
    _joined("w1", "w3", "w2", "block_sparse_moe"),
    ffn="intermediate_size",
    memory={r"(model\.layers\.\d+)\.mlp\.gate\.weight": r"\1.block_sparse_moe.gate.weight"},
)
ROUTED = (
    BLOCK
    | {"mlp.router": "mlp.gate"}
    | {f"mlp.experts.#.{name}": f"mlp.experts.#.{name}_proj" for name in ("gate", "up", "down")}
)
JOINED = _joined("gate_proj", "up_proj", "down_proj", "mlp")
QWEN2_MOE = moe(
    "qwen2_moe",
    ROUTED
    | {f"mlp.shared.{name}": f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    | {"mlp.shared_gate": "mlp.shared_expert_gate"},
    JOINED,
    ffn="moe_intermediate_size",
    biases=lambda config: (bool(config.qkv_bias), False, False),
    lists=("layer_types",),
)
QWEN3_MOE = moe(
    "qwen3_moe",
    ROUTED | HEAD_NORMS,
    JOINED,
    ffn="moe_intermediate_size",
    biases=attention_biases,
    qk_norm="unit",
)
MOES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE)
