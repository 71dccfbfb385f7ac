"""Rules about Megatron-core's own options: those that `megatron_support` refuses, and those that need others."""

from __future__ import annotations

from typing import Any

from slime_opd.config.config import Config
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


def recomputed(config: Config, need: str) -> list[str]:
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
