"""What a recurrent mixer remembers between calls: a layer of `transformers`' cache that does not grow."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, LinearAttentionLayer

from lcikernels.layers import State
from lcikernels.layers.layer import Layer
from lcikernels.ops.checks import refuse


class RecurrentLayer(LinearAttentionLayer, CacheLayerMixin):
    """The states of one recurrent mixer after `length` tokens: its recurrence's, and its convolution's.

    Unlike the LinearAttentionLayer it extends, it counts tokens, so that a model without attention has
    positions; it keeps the W-1 inputs that a convolution of width W needs; a new state replaces the old one.
    `DynamicCache(config=config)` builds one for every "recurrent" in `config.layer_types`.
    """

    _layer_type = "recurrent"
    is_compileable = False  # `length` is a Python int: every step would compile anew

    def __init__(self, max_cache_len: int = -1):
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self)
        self.length = 0

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, tokens: int = 0) -> Tensor:
        """Keep the state that `tokens` more tokens led to."""
        self.device, self.dtype = recurrent_states.device, recurrent_states.dtype
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = self.has_previous_state[state_idx] = True
        self.length += tokens
        return recurrent_states

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0) -> Tensor:
        """Keep the last inputs of the convolution."""
        self.conv_states[state_idx] = conv_states
        self.is_conv_states_initialized[state_idx] = True
        return conv_states

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        refuse("Cache.update", "layer_idx", "that of an attention layer", "one of a RecurrentLayer")

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            expected = "0, for a recurrent state cannot forget its last tokens"
            refuse("Cache.crop", "tokens_to_remove", expected, tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.length:
            rows = torch.arange(len(self.recurrent_states[0]), device=self.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)


# A recurrent state has one size for all lengths, so a StaticCache can use the same layer.
STATIC_LAYER_TYPE_MAPPING[RecurrentLayer._layer_type] = RecurrentLayer


def check_cache(cache: Cache, config: PreTrainedConfig) -> None:
    """ValueError unless `cache` holds a RecurrentLayer exactly where layer_types say "recurrent", which it
    does not offload, and a layer of the config's window exactly where they say "sliding_attention".
    """
    kinds = config.layer_types
    layers = getattr(cache, "layers", None)
    if layers is None or (set(kinds) != {"full_attention"} and len(layers) != len(kinds)):
        refuse("LCIModel", "cache", f"DynamicCache(config=model.config){places(kinds)}", cache)
    have = [isinstance(layer, RecurrentLayer) for layer in layers]
    if layers and "recurrent" in kinds and have != [kind == "recurrent" for kind in kinds]:
        refuse("LCIModel", "cache", f"DynamicCache(config=model.config){places(kinds)}", cache)
    if "recurrent" in kinds and cache.offloading:
        refuse("LCIModel", "cache", "without offloading, for a state is needed whole in every step", cache)
    for i, (layer, slides) in enumerate(zip(layers, cache.is_sliding)):
        window = config.sliding_window if kinds[i] == "sliding_attention" else None
        if slides != (window is not None):
            expected = f"with a window of {window}" if window else "without a window, for attention reads all"
            refuse("LCIModel", "cache", f"{expected}, in layer {i}", "a window" if slides else "none")
        if window and getattr(layer, "sliding_window", window) != window:
            refuse("LCIModel", "cache", f"with a window of {window}, in layer {i}", layer.sliding_window)


def places(kinds: list[str]) -> str:
    """Where a cache of these layers has which."""
    named = {"recurrent": "a RecurrentLayer", "sliding_attention": "a window"}
    found = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in named}
    return "".join(f", with {named[kind]} in layers {at}" for kind, at in found.items() if at)


def recur(
    mixer: Layer,
    x: Tensor,
    layer_idx: int,
    cache: Cache | None,
    keep: Tensor | None,
    rotary: dict[str, tuple[Tensor, Tensor]],
) -> Tensor:
    """mixer(x) [B, T, hidden_size] from the cache's state on, where there is a cache, which is advanced.

    keep [B, T]: False at padding, None where there is none; rotary: the argument, for mixers that have it.
    """
    if cache is None:
        return mixer(x, keep=keep, **rotary)
    state = None
    if (recurrent := cache.get_recurrent_state(layer_idx)) is not None:
        state = State(recurrent, cache.get_conv_state(layer_idx))
    if decodes(x, keep, state):
        y = mixer.step(x[:, 0], state, **rotary)[:, None]
    else:
        y, state = mixer(x, state, keep=keep, return_state=True, **rotary)
    if state.conv is not None:
        cache.update_conv_state(state.conv, layer_idx)
    cache.update_recurrent_state(state.recurrent, layer_idx, tokens=x.shape[1])
    return y


def decodes(x: Tensor, keep: Tensor | None, state: State | None) -> bool:
    """Whether x [B, T, ...] is one real token on a state that may change in place.

    It may not where gradients are recorded, nor outside torch.inference_mode() if it was made inside, which a
    graph that is being compiled cannot ask.
    """
    if x.shape[1] > 1 or keep is not None or state is None or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return True
    return not any(u.is_inference() for u in state if u is not None)


def state_bytes(cache: Cache) -> list[int]:
    """The memory that each layer of `cache` holds on to; a view counts as all that it keeps alive."""
    return [sum(x.untyped_storage().nbytes() for x in _held(layer)) for layer in cache.layers]


def _held(layer: CacheLayerMixin) -> list[Tensor]:
    if isinstance(layer, RecurrentLayer):
        held = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    else:
        held = [layer.keys, layer.values] if layer.is_initialized else []
    return [x for x in held if x is not None]
