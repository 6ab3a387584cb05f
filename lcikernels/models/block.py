"""A layer of the causal LM: the mixer that the config's pattern names, an MLP, and the norms around them."""

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from lcikernels.layers import Mamba, Mamba2, Retention
from lcikernels.models.attention import Attention
from lcikernels.models.cache import recur
from lcikernels.models.config import LCIConfig
from lcikernels.models.mlp import MLP
from lcikernels.models.norms import stream_norm
from lcikernels.models.packing import Packing

MIXERS = {
    "A": Attention,
    "W": Attention,
    "R": Retention.from_config,
    "M": Mamba.from_config,
    "S": Mamba2.from_config,
}


class LCIBlock(GradientCheckpointingLayer):
    """Sequential: y + s mlp(y) with y = x + s mixer(x); parallel: x + s (mlp(x) + mixer(x)).

    mixer(x) stands for mixer(mixer_norm(x)) where norms stand before, mixer_out_norm(mixer(mixer_norm(x)))
    where they stand around, mixer_out_norm(mixer(x)) inside; mlp(x) likewise. s is
    residual_scale; a norm that is not there is an Identity.
    """

    def __init__(self, config: LCIConfig, layer_idx: int):
        super().__init__()
        self.parallel, self.layer_idx = config.use_parallel_residual, layer_idx
        self.residual_scale = config.residual_scale
        before, after = config.norm_placement != "inside", config.norm_placement != "before"
        self.mixer_norm = stream_norm(config) if before else nn.Identity()
        self.mixer = MIXERS[config.pattern[layer_idx]](config, layer_idx)
        self.mixer_out_norm = stream_norm(config) if after else nn.Identity()
        self.mlp_norm = stream_norm(config) if before else nn.Identity()
        self.mlp = MLP(config)
        self.mlp_out_norm = stream_norm(config) if after else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        packing: Packing | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        mixed = self.mix(self.mixer_norm(x), rotary, mask, packing, cache)
        mixed = self.scaled(self.mixer_out_norm(mixed))
        if self.parallel:
            return self.feed_forward(x) + mixed + x
        x = mixed + x
        return self.feed_forward(x) + x

    def feed_forward(self, x: Tensor) -> Tensor:
        """What the MLP adds to the stream x."""
        return self.scaled(self.mlp_out_norm(self.mlp(self.mlp_norm(x))))

    def scaled(self, x: Tensor) -> Tensor:
        return x if self.residual_scale == 1 else x * self.residual_scale

    def mix(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        packing: Packing | None,
        cache: Cache | None,
    ) -> Tensor:
        """The mixer's output at its own input x, with neither norm.

        mask: attention's; for other mixers the kept tokens, which `packing` has where it is given.
        """
        if isinstance(self.mixer, Attention):
            return self.mixer(x, rotary, mask, cache)
        options = {} if rotary is None else {"rotary": rotary}
        if packing is None:
            return recur(self.mixer, x, self.layer_idx, cache, mask, options)
        return packing.unpack(self.mixer(packing.pack(x), None, packing.cu_seqlens, **options))
