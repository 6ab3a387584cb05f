from math import inf
from types import SimpleNamespace

import pytest


@pytest.fixture
def sizes() -> SimpleNamespace:
    """What the layers read of a config."""
    return SimpleNamespace(
        hidden_size=24,
        retention_num_heads=3,
        retention_log_decay=None,
        attention_bias=True,
        rotary_dims={"R": 4},
        rope_parameters={"rope_theta": 100.0},
        layer_norm_eps=1e-5,
        expand=2,
        state_size=5,
        conv_kernel=4,
        time_step_rank=3,
        mamba2_num_heads=6,
        mamba2_state_size=5,
        mamba2_n_groups=1,
        time_step_limit=(0.0, inf),
    )
