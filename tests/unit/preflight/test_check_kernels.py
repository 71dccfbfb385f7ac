"""A configuration's attention is read from its flags or its config.json, and kernels that are not there are refused
before a run.
"""

import json
import subprocess

import pytest

from slime_opd.config import parse
from slime_opd.config.attention import attention_of
from slime_opd.config.kernels import Attention, Machine
from slime_opd.preflight import check_kernels
from slime_opd.preflight.rules import RULES

H100_TE = Machine(has_cuda=True, compute_capability=(9, 0), engine="2.11.0")
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


@pytest.fixture
def on(monkeypatch):
    """Puts the rules on a described machine."""
    return lambda machine: monkeypatch.setattr(check_kernels.machines, "of_this_computer", lambda: machine)


@pytest.fixture
def bridge(tmp_path):
    """Flags of bridge mode with a config.json."""

    def write(**config) -> list[str]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return ["--megatron-to-hf-mode", "bridge", "--hf-checkpoint", str(tmp_path)]

    return write


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "qwen3", "head_dim": 64}, Attention(query_width=64, value_width=64)),
        ({"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4}, Attention(query_width=16, value_width=16)),
        ({"model_type": "qwen2", "head_dim": 64, "attention_dropout": 0.1}, Attention(query_width=64, value_width=64, dropout=0.1)),
        ({"model_type": "glm4", "head_dim": 128}, Attention(is_interleaved=True)),
        ({"model_type": "deepseek_v3", **LATENT}, Attention(is_latent=True, query_width=192)),
        (
            {"model_type": "deepseek_v3", "rope_scaling": {"type": "yarn", "factor": 40}, **LATENT},
            Attention(is_latent=True, query_width=192, has_yarn=True),
        ),
        (
            {"model_type": "deepseek_v3", "rope_parameters": {"rope_type": "yarn"}, **LATENT},
            Attention(is_latent=True, query_width=192, has_yarn=True),
        ),
    ],
)  # fmt: skip
def test_attention_is_read_from_a_config_json(bridge, config, expected):
    assert attention_of(parse(bridge(**config)), has_cuda=True) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--kv-channels 64", Attention(query_width=64, value_width=64)),
        ("--hidden-size 64 --num-attention-heads 4", Attention(query_width=16, value_width=16)),
        ("--kv-channels 128 --attention-dropout 0.1 --fp16", Attention(dtype="fp16", dropout=0.1)),
        ("--kv-channels 128 --rotary-interleaved --attention-backend flash", Attention(is_interleaved=True, backend="flash")),
        ("--kv-channels 128 --no-rope-fusion", Attention(rope_fusion=False)),
        ("--multi-latent-attention --rope-type rope", Attention(is_latent=True, query_width=192)),
        (
            "--multi-latent-attention --qk-head-dim 64 --qk-pos-emb-head-dim 32 --v-head-dim 64",
            Attention(is_latent=True, has_yarn=True, query_width=96, value_width=64, latent_widths=(64, 32)),
        ),
    ],
)  # fmt: skip
def test_attention_is_read_from_the_flags(flags, expected):
    assert attention_of(parse(flags.split()), has_cuda=True) == expected


@pytest.mark.parametrize(
    ("flags", "has_cuda", "dtype"),
    [
        ([], False, "fp32"), ([], True, "bf16"), (["--bf16"], False, "bf16"), (["--fp32"], True, "fp32"),
        (["--fp16"], False, "fp16"),
    ],
)  # fmt: skip
def test_the_dtype_is_the_trainers(flags, has_cuda, dtype):
    assert attention_of(parse(flags), has_cuda=has_cuda).dtype == dtype


def test_flash_without_flash_attn_is_refused_before_any_work(on):
    on(H100_TE)
    (problem,) = check_kernels.check_kernels(parse(["--attention-backend", "flash"]))
    assert problem.startswith("--attention-backend flash: flash-attn is not installed here")
    assert check_kernels.check_kernels(parse([])) == []


def test_a_computer_without_a_gpu_refuses_no_kernel_since_others_may_train(on):
    on(Machine())
    assert check_kernels.check_kernels(parse(["--attention-backend", "flash", "--apply-rope-fusion"])) == []


def test_a_fused_rotation_that_is_wrong_everywhere_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(check_kernels.machines, "of_this_computer", lambda: pytest.fail("looked at the machine"))
    assert check_kernels.check_rope_fusion in RULES
    assert check_kernels.check_rope_fusion(parse(["--apply-rope-fusion"])) == []
    assert check_kernels.check_rope_fusion(parse(["--rotary-interleaved"])) == []
    (problem,) = check_kernels.check_rope_fusion(parse(["--apply-rope-fusion", "--rotary-interleaved"]))
    assert problem.startswith("--apply-rope-fusion: ")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (subprocess.CalledProcessError(1, ["python"], stderr="Traceback\nImportError: no torch\n"), "ImportError: no torch"),
        (subprocess.TimeoutExpired(["python"], 300), "timed out"),
        (ValueError("Expecting value: line 1"), "Expecting value"),
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_be_inspected_is_a_problem(monkeypatch, error, reason):
    def fail():
        raise error

    monkeypatch.setattr(check_kernels.machines, "of_this_computer", fail)
    (problem,) = check_kernels.check_kernels(parse([]))
    assert reason in problem
    assert "python -m slime_opd.config.machine" in problem
    assert check_kernels.notes(parse([])) == []


def test_a_machine_without_transformer_engine_is_noted(on):
    on(Machine(has_cuda=True, compute_capability=(9, 0)))
    (note,) = check_kernels.notes(parse([]))
    assert note.startswith("Transformer Engine is not installed here")
    on(H100_TE)
    assert check_kernels.notes(parse([])) == []
    assert check_kernels.notes(parse(["--attention-backend", "flash"])) == []
