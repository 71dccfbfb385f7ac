"""Rules about Megatron-core's own options: those that `megatron_support` refuses, and those that need others."""

from __future__ import annotations

import importlib.util
from typing import Any

from slime_opd.config.config import Config
from slime_opd.config.families import number_of_experts
from slime_opd.config.hf_config import architecture_of
from slime_opd.config.megatron_options import is_default
from slime_opd.config.megatron_rules import RECOMPUTED
from slime_opd.config.megatron_support import OF_MODEL, SUPPORT, Answer
from slime_opd.config.options import options_of


def given_values(config: Config) -> dict[str, Any]:
    """Megatron's options that are set and differ from Megatron's defaults, by field."""
    stage = config.megatron
    values = {name: getattr(stage, name, None) for name in SUPPORT}
    return {
        name: value
        for name, value in values.items()
        if value not in (None, ()) and (SUPPORT[name].refuses_default or not is_default(name, value))
    }


def flag_with_value(name: str, value: Any) -> str:
    """The option and its value as on a command line, and Megatron-LM's name for it where that is another."""
    return options_of(Config)[name].format_flag(value)


def check_supported(config: Config) -> list[str]:
    """Options that this package does not support, or that would have no effect here."""
    problems = []
    for name, value in given_values(config).items():
        support = SUPPORT[name]
        if not support.is_refused or value in support.allowed:
            continue
        outcome = "has no effect here" if support.answer is Answer.NO_EFFECT else "is not supported"
        problems.append(f"{flag_with_value(name, value)} {outcome}: {support.reason}")
    return problems


def check_needs(config: Config) -> list[str]:
    """Options of Megatron's that have no effect, or fail, without another one."""
    given, stage, layout = given_values(config), config.megatron, config.parallel
    problems: list[str] = []

    def needs(name: str, holds: bool, what: str) -> None:
        if name in given and not holds:
            problems.append(f"{flag_with_value(name, given[name])} needs {what}")

    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        needs(name, layout.pipeline_model_parallel_size > 1, "--pipeline-model-parallel-size 2 or more")
    needs(
        "deallocate_pipeline_outputs",
        layout.pipeline_model_parallel_size > 1,
        "--pipeline-model-parallel-size 2 or more",
    )
    needs(
        "optimizer_cpu_offload",
        not config.training.fp32,
        "half precision (--bf16): Megatron offloads the float32 copy of the weights",
    )
    needs(
        "optimizer_cpu_offload",
        bool(stage.use_precision_aware_optimizer),
        "--use-precision-aware-optimizer: without it Megatron cannot load the state of a checkpoint into it",
    )
    if stage.optimizer_cpu_offload and stage.decoupled_weight_decay is False:
        problems.append("--optimizer-cpu-offload needs --decoupled-weight-decay, which is on unless it is turned off")
    needs(
        "moe_shared_expert_overlap",
        "shared_experts" not in stage.recompute_modules,
        "--recompute-modules without shared_experts: what overlaps is not recomputed",
    )
    for name in ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"):
        needs(
            name,
            config.training.fp16 and stage.loss_scale is None,
            "--fp16, whose loss scale follows the gradients, without --loss-scale",
        )
    lowest, first = stage.min_loss_scale or 1.0, stage.initial_loss_scale or 2.0**32
    if config.training.fp16 and stage.loss_scale is None and lowest > first:
        problems.append(f"--initial-loss-scale {first:.10g} is below --min-loss-scale {lowest:.10g}")
    return problems + _recompute_problems(config)


def _recompute_problems(config: Config) -> list[str]:
    layout, stage = config.parallel, config.megatron
    problems = []
    is_full = layout.recompute_granularity == "full"
    if stage.distribute_saved_activations and not (
        is_full and layout.tensor_model_parallel_size > 1 and not layout.sequence_parallel
    ):
        problems.append(
            "--distribute-saved-activations needs --recompute-granularity full and --tensor-model-parallel-size 2 or more, without --sequence-parallel, which splits them already"
        )
    return problems


def has_engine(config: Config) -> bool:
    """Whether layers will be Transformer Engine's, as far as this machine tells."""
    return importlib.util.find_spec("transformer_engine") is not None and config.training.attention_backend != "local"


def check_engine(config: Config) -> list[str]:
    """Options that only Transformer Engine's layers and optimizers can follow."""
    if has_engine(config):
        return []
    needed = [
        (flag_with_value(name, value), SUPPORT[name].reason)
        for name, value in given_values(config).items()
        if SUPPORT[name].answer is Answer.ENGINE
    ]
    needed += [
        (f"--recompute-modules {name}", "Megatron recomputes it with its help")
        for name in _recomputed(config, "engine")
    ]
    if config.megatron.moe_token_dispatcher_type == "flex":
        needed.append(("--moe-token-dispatcher-type flex", SUPPORT["moe_enable_deepep"].reason))
    if (size := config.parallel.expert_tensor_parallel_size) > 1:
        needed.append((f"--expert-tensor-parallel-size {size}", "its layers split an expert"))
    local = config.training.attention_backend == "local"
    why = "--attention-backend local is chosen" if local else "it is not installed here"
    return [
        f"{shown} needs Transformer Engine ({reason}), and {why}: drop the flag, or run on a machine with CUDA and Transformer Engine (tools/setup_gpu.sh)"
        for shown, reason in needed
    ]


def check_flex_dispatcher(config: Config) -> list[str]:
    """The flex dispatcher without DeepEP, or without ranks to dispatch to."""
    stage, layout = config.megatron, config.parallel
    is_flex = stage.moe_token_dispatcher_type == "flex"
    problems = []
    if not is_flex:
        return []
    if importlib.util.find_spec("deep_ep") is None:
        problems.append(
            "--moe-token-dispatcher-type flex needs the deep_ep package, which is not installed here: say alltoall"
        )
    if layout.expert_model_parallel_size * layout.expert_tensor_parallel_size == 1:
        problems.append("--moe-token-dispatcher-type flex needs --expert-model-parallel-size 2 or more: say alltoall")
    if stage.moe_shared_expert_overlap:
        problems.append("--moe-shared-expert-overlap needs --moe-token-dispatcher-type alltoall, found flex")
    return problems


def check_kind_of_model(config: Config) -> list[str]:
    """Options of a mixture of experts, or of latent attention, given for a model that is or has none."""
    architecture, stage = architecture_of(config), config.megatron
    if not architecture and config.model.num_layers is None:
        return []
    problems = []
    if not (stage.num_moe_experts or number_of_experts(architecture)):
        given = [
            flag_with_value(name, value)
            for name, value in given_values(config).items()
            if name.startswith("moe_") and not SUPPORT[name].is_refused
        ]
        given += [f"--recompute-modules {name}" for name in _recomputed(config, "experts")]
        problems += [f"{shown} has no effect: the model has no experts (--num-experts)" for shown in given]
    if not (stage.multi_latent_attention or architecture.get("kv_lora_rank")):
        problems += [
            f"--recompute-modules {name} needs a model with latent attention (--multi-latent-attention)"
            for name in _recomputed(config, "latent attention")
        ]
    return problems


def _recomputed(config: Config, need: str) -> list[str]:
    """The parts of --recompute-modules that need something."""
    return [name for name in config.megatron.recompute_modules if need in RECOMPUTED.get(name, ())]


def notes_of_model_flags(config: Config) -> list[str]:
    """Flags of the model that nothing reads, because the model is that of --hf-checkpoint."""
    if config.model.megatron_to_hf_mode != "bridge":
        return []
    given = [flag_with_value(name, value) for name, value in given_values(config).items() if name in OF_MODEL]
    if not given:
        return []
    return [
        f"--megatron-to-hf-mode bridge takes the model from --hf-checkpoint's config.json, and does not read {', '.join(given)}"
    ]
