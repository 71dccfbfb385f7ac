"""Reading a Hugging Face config of transformers 4 or 5."""

import json
from types import SimpleNamespace

import pytest

from slime_opd.model import families


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
    monkeypatch.setattr(families.AutoConfig, "from_pretrained", lambda directory, **options: found)
    read = families.read_config("anywhere")
    assert (read.rope_theta, read.partial_rotary_factor, read.head_dim) == (5e5, 0.5, 16)


def test_code_in_a_hugging_face_directory_is_never_run_even_if_a_user_at_the_terminal_would_agree(
    tmp_path, monkeypatch
):
    made = tmp_path / "made"
    (tmp_path / "configuration_own.py").write_text(
        f"open({str(made)!r}, 'w').close()\nfrom transformers import PretrainedConfig\nclass OwnConfig(PretrainedConfig): pass\n"
    )
    config = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    with pytest.raises(ValueError, match="custom code"):
        families.read_config(str(tmp_path))
    assert not made.exists()
