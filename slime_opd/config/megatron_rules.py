"""Declarations of Megatron-core's options that its source does not have: ranges, choices, conditions, on_resume."""

from __future__ import annotations

from typing import Any

from slime_opd.config.conditions import equals, is_set
from slime_opd.config.ranges import FRACTION, NOT_NEGATIVE, POSITIVE
from slime_opd.config.resume import LOSS_SCALE

# Parts of a layer that --recompute-modules takes, and what each needs: Transformer Engine's layers, or a kind of model.
RECOMPUTED: dict[str, tuple[str, ...]] = {
    "core_attn": (),
    "mlp": (),
    "moe": ("experts",),
    "shared_experts": ("experts",),
    "moe_act": ("engine", "experts"),
    "layernorm": ("engine",),
    "mla_up_proj": ("latent attention",),
}

_OVERLAP = (is_set("overlap_grad_reduce"),)
_OFFLOAD = (is_set("optimizer_cpu_offload"),)
_PRECISION_AWARE = (is_set("use_precision_aware_optimizer"),)
_FLEX = (equals("moe_token_dispatcher_type", "flex"),)

# Keywords of `options.option`, by field.
RULES: dict[str, dict[str, Any]] = {
    "num_layers_in_first_pipeline_stage": {"within": POSITIVE},
    "num_layers_in_last_pipeline_stage": {"within": POSITIVE},
    "recompute_modules": {
        "choices": tuple(RECOMPUTED),
        "only_with": (equals("recompute_granularity", "selective"),),
    },
    "overlap_param_gather": {"only_with": _OVERLAP},
    "bucket_size": {"within": POSITIVE, "only_with": _OVERLAP},
    "decoupled_lr": {"within": POSITIVE},
    "decoupled_min_lr": {"within": NOT_NEGATIVE, "only_with": (is_set("decoupled_lr"),)},
    "loss_scale": {"within": POSITIVE},
    "initial_loss_scale": {"within": POSITIVE, "on_resume": LOSS_SCALE},
    "min_loss_scale": {"within": POSITIVE},
    "loss_scale_window": {"within": POSITIVE},
    "hysteresis": {"within": POSITIVE},
    "optimizer_offload_fraction": {"within": FRACTION, "only_with": _OFFLOAD},
    "use_torch_optimizer_for_cpu_offload": {"only_with": _OFFLOAD},
    "overlap_cpu_optimizer_d2h_h2d": {"only_with": _OFFLOAD},
    "pin_cpu_grads": {"only_with": _OFFLOAD},
    "pin_cpu_params": {"only_with": _OFFLOAD},
    "store_param_remainders": {"only_with": _PRECISION_AWARE},
    "main_grads_dtype": {"choices": ("fp32", "bf16"), "only_with": _PRECISION_AWARE},
    "main_params_dtype": {"choices": ("fp32", "fp16"), "only_with": _PRECISION_AWARE},
    "exp_avg_dtype": {"only_with": _PRECISION_AWARE},
    "exp_avg_sq_dtype": {"only_with": _PRECISION_AWARE},
    "moe_router_bias_update_rate": {"within": NOT_NEGATIVE},
    "moe_enable_deepep": {"only_with": _FLEX},
    "moe_deepep_num_sms": {"within": POSITIVE, "only_with": _FLEX},
}
