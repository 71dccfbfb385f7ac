"""Arguments of Megatron's dataclasses, from the user's Megatron options."""

from __future__ import annotations

import torch

from slime_opd.config import parse
from slime_opd.model.options import settings

WORDS = ["--moe-router-topk", "4", "--moe-router-dtype", "fp32", "--no-moe-grouped-gemm", "--exp-avg-dtype", "bf16"]


def test_in_raw_mode_the_flags_describe_the_model():
    assert settings(parse(WORDS), "transformer") == {"moe_router_topk": 4, "moe_router_dtype": "fp32"}


def test_in_bridge_mode_the_hugging_face_config_describes_the_model():
    assert settings(parse([*WORDS, "--megatron-to-hf-mode", "bridge"]), "transformer") == {"moe_router_dtype": "fp32"}


def test_dtype_options_become_torch_dtypes():
    assert settings(parse(WORDS), "optimizer") == {"exp_avg_dtype": torch.bfloat16}
