"""One causal LM: an embedding, blocks, a norm and a head, as transformers calls models."""

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from lcikernels.layers import Mamba, Mamba2, Retention
from lcikernels.layers.norm import RMSNorm
from lcikernels.layers.retention import log_decays
from lcikernels.models.attention import AttentionWeights
from lcikernels.models.block import LCIBlock
from lcikernels.models.cache import check_cache
from lcikernels.models.config import LCIConfig
from lcikernels.models.fields import ATTENTION
from lcikernels.models.masks import attention_masks
from lcikernels.models.norms import stream_norm
from lcikernels.models.packing import find_packing, kept_tokens
from lcikernels.models.positions import Rotary, check_places, text_length
from lcikernels.ops.checks import refuse


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
        if isinstance(module, RMSNorm):
            init.copy_(module.weight, module.initial_value())
        elif isinstance(module, Rotary):
            for name, value in module.values().items():
                init.copy_(module.get_buffer(name), value)
        elif isinstance(module, Retention) and module.in_float32:
            init.copy_(module.A_log, module.initial_A_log())
        elif isinstance(module, Retention):
            init.copy_(module.fixed_decay, log_decays(module.num_heads, module.decays))
        elif isinstance(module, Mamba | Mamba2):
            for name, value in module.initial_values().items():
                init.copy_(module.get_parameter(name), value)


class LCIModel(LCIPreTrainedModel):
    """Embedding, blocks, final norm; a table of positions where the config says "learned"."""

    def __init__(self, config: LCIConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.rotary = Rotary(config)
        self.layers = nn.ModuleList(LCIBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = stream_norm(config)
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
        """input_ids [B, T] or inputs_embeds [B, T, hidden_size], as embed_tokens gives them, not scaled yet;
        attention_mask [B, past + T], 0 at padding.

        Padding, wherever it stands, reaches neither another token nor a cached state; but a window counts it,
        as the caches do, and so do positions. Without position_ids
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
        self.rotary.check()
        if (input_ids is None) == (inputs_embeds is None):
            refuse("LCIModel", "input_ids", "given, or inputs_embeds, not both", "both or neither")
        pattern = self.config.pattern
        recurrent = not set(pattern) <= set(ATTENTION)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if (scale := self.config.embedding_scale) != 1:
            x = x * torch.tensor(scale, dtype=x.dtype, device=x.device)
        B, T, _ = x.shape

        given = cache
        if given is not None:
            check_cache(given, self.config)
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

        if self.config.position_embedding_type == "learned":
            check_places(positions, self.config.max_position_embeddings)
            x = x + self.embed_positions(positions)
        masks = dict.fromkeys("RMS", keep)
        masks |= attention_masks(self.config, x, attention_mask, given, position_ids, packing, keep)
        rotary = {}
        for letter in self.rotary.ropes:
            packed = packing is not None and letter == "R"
            places = packing.pack(positions.expand(B, T)) if packed else positions
            rotary[letter] = self.rotary(letter, places, x.dtype)

        for i, (letter, layer) in enumerate(zip(pattern, self.layers)):
            angles = rotary.get(letter) if self.config.rotates(i) else None
            x = layer(x, angles, masks[letter], packing, cache=cache)
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
        return not set(self.config.pattern) <= set(ATTENTION)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,  # transformers reads this name, and those before it, to know what forward may be given
    ) -> dict:
        """As transformers', but where "longrope" turns all tokens otherwise, the text is read anew."""
        new, rotary = next_sequence_length or input_ids.shape[1], self.model.rotary
        if not rotary.ahead and rotary.turns(input_ids, cache, new, attention_mask):
            cache = next_sequence_length = None
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            cache=cache,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _prefill(self, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict, **options):
        """As transformers', but a prompt in chunks is rotated as the whole is."""
        cache, mask = model_kwargs.get("cache"), model_kwargs.get("attention_mask")
        past, T = 0 if cache is None else int(cache.get_seq_length()), input_ids.shape[1]
        told = getattr(generation_config, "_mask_length", T) if mask is None else mask.shape[1]
        new = T - past if told == T else T  # ids are the whole text, or what follows the cache's
        if self.model.rotary.turns(input_ids, cache, new, mask):
            model_kwargs = model_kwargs | {"cache": DynamicCache(config=self.config)}
        self.model.rotary.ahead = text_length(past + new, mask)
        try:
            return super()._prefill(input_ids, generation_config, model_kwargs, **options)
        finally:
            self.model.rotary.ahead = 0

    def logits(self, hidden: Tensor) -> Tensor:
        """Of LCIModel's last_hidden_state [.., hidden_size], or a part of it: [.., vocab_size]."""
        logits = self.lm_head(hidden)
        if self.config.logits_scale != 1:
            logits = logits * self.config.logits_scale
        if (cap := self.config.final_softcap) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

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
        logits = self.logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
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
    if not set(config.pattern) & set(ATTENTION):
        got = f"True for the pattern {config.pattern!r}"
        refuse("LCIModel", "output_attentions", "False where no layer is attention", got)
    if (kind := config._attn_implementation) != "eager":
        expected = "False, or attn_implementation='eager', for others keep no weights"
        refuse("LCIModel", "output_attentions", expected, f"True with {kind!r}")
