"""What each attention layer of a model may see."""

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from lcikernels.models.fields import ATTENTION
from lcikernels.models.packing import Packing

MAKERS = {"A": create_causal_mask, "W": create_sliding_window_causal_mask}


def attention_masks(
    config: PreTrainedConfig,
    x: Tensor,
    attention_mask: Tensor | dict[str, Tensor | None] | None,
    cache: Cache | None,
    position_ids: Tensor | None,
    packing: Packing | None,
    keep: Tensor | None,
) -> dict[str, Tensor | None]:
    """For each letter of attention in the pattern, what attention functions take: None is causal.

    A window counts tokens as they stand in a row, padding too, as caches do; in packed rows the kept ones.
    """
    masks: dict[str, Tensor | None] = {}
    for letter, kind in ATTENTION.items():
        if letter not in config.pattern:
            continue
        if isinstance(attention_mask, dict):  # from generate() with a StaticCache, attention layers only
            masks[letter] = attention_mask[kind]
        elif packing is not None:
            masks[letter] = packing.visible(keep, config.sliding_window if letter == "W" else None)
        else:
            masks[letter] = MAKERS[letter](
                config=config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                cache=cache,  # not a fresh one: transformers looks for packed rows where there is none
                layer_idx=config.pattern.index(letter),
                position_ids=position_ids,
                # transformers gives a lone token no mask, but a StaticCache has empty places after it.
                allow_is_causal_skip=not isinstance(cache, StaticCache),
            )
    return masks
