"""What families are read from, whichever transformers wrote it."""

from types import SimpleNamespace

import pytest

from slime_opd.megatron import families


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e5, "partial_rotary_factor": 0.5, "head_dim": 16},
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5},
            "head_dim": None,
        },
    ],
)
def test_rotary_settings_are_found_where_transformers_4_and_5_keep_them(config, monkeypatch):
    found = SimpleNamespace(hidden_size=64, num_attention_heads=4, **config)
    monkeypatch.setattr(families.AutoConfig, "from_pretrained", lambda directory: found)
    read = families.read_config("anywhere")
    assert (read.rope_theta, read.partial_rotary_factor, read.head_dim) == (5e5, 0.5, 16)
