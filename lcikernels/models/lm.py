"""One causal LM: GPT-NeoX's block with the mixer that the config's pattern names in each layer."""

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from lcikernels.layers import Mamba, Mamba2, Retention
from lcikernels.layers.retention import log_decays
from lcikernels.layers.rotary import rotary_angles
from lcikernels.models.attention import Attention, AttentionWeights
from lcikernels.models.cache import check_cache, recur
from lcikernels.models.config import LCIConfig, check_rotary
from lcikernels.models.mlp import MLP
from lcikernels.models.packing import Packing, find_packing, kept_tokens
from lcikernels.ops.checks import refuse

MIXERS = {
    "A": Attention,
    "R": Retention.from_config,
    "M": Mamba.from_config,
    "S": Mamba2.from_config,
}


class LCIBlock(GradientCheckpointingLayer):
    """Parallel: x + mixer(mixer_norm(x)) + mlp(mlp_norm(x)).

    Sequential: y + mlp(mlp_norm(y)) with y = x + mixer(mixer_norm(x)).
    """

    def __init__(self, config: LCIConfig, layer_idx: int):
        super().__init__()
        self.parallel, self.layer_idx = config.use_parallel_residual, layer_idx
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = MIXERS[config.pattern[layer_idx]](config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        packing: Packing | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        mixed = self.mix(self.mixer_norm(x), rotary, mask, packing, cache)
        if self.parallel:
            return self.mlp(self.mlp_norm(x)) + mixed + x
        x = mixed + x
        return self.mlp(self.mlp_norm(x)) + x

    def mix(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        packing: Packing | None,
        cache: Cache | None,
    ) -> Tensor:
        """mask: attention's; for other mixers the kept tokens, which `packing` has where it is given."""
        if isinstance(self.mixer, Attention):
            return self.mixer(x, rotary, mask, cache)
        options = {} if rotary is None else {"rotary": rotary}
        if packing is None:
            return recur(self.mixer, x, self.layer_idx, cache, mask, options)
        return packing.unpack(self.mixer(packing.pack(x), None, packing.cu_seqlens, **options))


class LCIPreTrainedModel(PreTrainedModel):
    """What LCIModel and LCIForCausalLM tell transformers about themselves."""

    config: LCIConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LCIBlock"]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True
    _can_record_outputs = {
        "hidden_states": LCIBlock,
        "attentions": OutputRecorder(AttentionWeights, index=0),
    }
    # bfloat16 would put a Mamba's rates off by up to 0.8 % and its steps by up to 1.6 %.
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias", "dt_proj.bias"}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing, as LCIConfig's."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # matrices and embeddings by initializer_range, norms 1 and 0
        if isinstance(module, Retention):
            init.copy_(module.log_decay, log_decays(module.num_heads, module.decays))
        elif isinstance(module, Mamba | Mamba2):
            for name, value in module.initial_values().items():
                init.copy_(module.get_parameter(name), value)


class LCIModel(LCIPreTrainedModel):
    """Embedding, blocks, final norm."""

    def __init__(self, config: LCIConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LCIBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T] or inputs_embeds [B, T, hidden_size]; attention_mask [B, past + T], 0 at padding.

        Padding, wherever it stands, reaches neither another token nor a cached state. Without position_ids
        tokens count on from the cache. output_attentions gives the weights of the attention layers, where
        attn_implementation is "eager".

        A row may hold several sequences, one after another, of which none sees another: where position_ids
        restart, where seq_idx [B, T] changes, or with B = 1 at cu_seq_lens_q [N+1]; what
        DataCollatorWithFlattening gives of these may be given together (cu_seq_lens_k must be cu_seq_lens_q,
        the max_length follow from it). There is no cache then, neither given nor returned. A compiled graph,
        whose shapes cannot follow from values, is told by cu_seq_lens_q alone. Where all layers are attention
        and there is an attention_mask, positions tell no sequences apart, as in transformers; seq_idx does.

        Raises ValueError where an argument does not fit the pattern or another argument.
        """
        if output_attentions or self.config.output_attentions:
            check_attentions(self.config)
        check_rotary(self.config)
        if (input_ids is None) == (inputs_embeds is None):
            refuse("LCIModel", "input_ids", "given, or inputs_embeds, not both", "both or neither")
        pattern = self.config.pattern
        recurrent = set(pattern) != {"A"}
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x.shape

        given = cache
        if given is not None:
            check_cache(given, self.config.layer_types)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                expected = "None under gradient checkpointing, which runs a layer twice"
                refuse("LCIModel", "cache", expected, given)
        past = 0 if given is None else given.get_seq_length()
        told = cu_seq_lens_q is not None or seq_idx is not None
        masked = attention_mask is not None and not isinstance(attention_mask, dict)
        keep = kept_tokens(attention_mask, B, past, T) if masked and (recurrent or told) else None
        packing = find_packing(
            x,
            keep,
            given,
            # What attention alone can go on from, or under a mask, is as transformers has it.
            position_ids if recurrent or (attention_mask is None and given is None) else None,
            cu_seq_lens_q,
            cu_seq_lens_k,
            seq_idx,
            recurrent,
        )
        if use_cache and given is None and packing is None:
            cache = DynamicCache(config=self.config)
        positions = position_ids
        if position_ids is None and packing is None:
            positions = torch.arange(T, device=x.device)[None] + past
        elif position_ids is None:
            positions = packing.positions()

        masks: dict[str, Tensor | None] = {"R": keep, "M": keep, "S": keep}
        if isinstance(attention_mask, dict):  # from generate() with a StaticCache, attention layers only
            masks["A"] = attention_mask["full_attention"]
        elif packing is not None:
            masks["A"] = packing.visible(keep) if "A" in pattern else None
        elif "A" in pattern:
            masks["A"] = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                cache=given,  # not a fresh one: transformers looks for packed rows where there is none
                layer_idx=pattern.index("A"),
                position_ids=position_ids,
                # transformers gives a lone token no mask, but a StaticCache has empty places after it.
                allow_is_causal_skip=not isinstance(given, StaticCache),
            )
        theta, dims = self.config.rope_parameters["rope_theta"], self.config.rotary_dims
        places = dict.fromkeys(dims, positions)
        if packing is not None and "R" in dims:
            places["R"] = packing.pack(positions.expand(B, T))
        rotary = {letter: rotary_angles(places[letter], dims[letter], theta, x.dtype) for letter in dims}

        for letter, layer in zip(pattern, self.layers):
            x = layer(x, rotary.get(letter), masks[letter], packing, cache=cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), cache=cache)


class LCIForCausalLM(LCIPreTrainedModel, GenerationMixin):
    """LCIModel and a head over the vocabulary, tied to the embedding where the config says so."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True  # the Trainer hands over num_items_in_batch

    def __init__(self, config: LCIConfig):
        super().__init__(config)
        self.model = LCIModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def _is_stateful(self) -> bool:
        """No assisted generation: it rewinds the cache."""
        return set(self.config.pattern) != {"A"}

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """As LCIModel, and logits [B, T, vocab_size], or the last `logits_to_keep` tokens' where not 0.

        labels [B, T], -100 where there is none: loss is the mean cross entropy of logits[t] and labels[t+1],
        or their sum over `num_items_in_batch`, which counts the labels of a whole step.
        """
        recorded = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
            seq_idx=seq_idx,
            **{name: wanted for name, wanted in recorded.items() if wanted is not None},
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            V = self.config.vocab_size
            loss = self.loss_function(logits, labels, vocab_size=V, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def check_attentions(config: LCIConfig) -> None:
    """ValueError where there are no attention weights to give."""
    if "A" not in config.pattern:
        got = f"True for the pattern {config.pattern!r}"
        refuse("LCIModel", "output_attentions", "False where no layer is attention", got)
    if (kind := config._attn_implementation) != "eager":
        expected = "False, or attn_implementation='eager', for others keep no weights"
        refuse("LCIModel", "output_attentions", expected, f"True with {kind!r}")
