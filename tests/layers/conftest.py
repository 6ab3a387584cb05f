import pytest

from lcikernels.models import LCIConfig


@pytest.fixture
def sizes() -> LCIConfig:
    """What the layers read of a config."""
    return LCIConfig(
        hidden_size=24,
        pattern="RMS",
        num_hidden_layers=3,
        retention_num_heads=3,
        rope_parameters={"rope_theta": 100.0, "partial_rotary_factor": 0.5},
        state_size=5,
        time_step_rank=3,
        mamba2_num_heads=6,
        mamba2_state_size=5,
    )
