"""The rules that need nothing but the configuration; preflight/rules.py has those that look at this machine.

A rule is a pure function `check_…(config) -> list of sentences` and a row of CHECKS. Rules never edit the
configuration, and all of them run, so a user reads all problems at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from slime_opd.config import (
    check_debug,
    check_distillation,
    check_learning,
    check_megatron,
    check_options,
    check_run,
    redact,
)
from slime_opd.config.config import Config

Check = Callable[[Config], list[str]]

CHECKS: tuple[Check, ...] = (
    check_options.check_ranges,
    check_options.check_effects,
    check_options.check_needs,
    check_learning.check_required,
    check_learning.check_length_of_run,
    check_run.check_model,
    check_run.check_layout,
    check_run.check_context_parallel,
    check_run.check_precision,
    check_run.check_layer_patterns,
    check_megatron.check_supported,
    check_megatron.check_needs,
    check_run.check_warmup,
    check_run.check_batches,
    check_run.check_engines,
    check_run.check_engine_fits_node,
    check_run.check_save_hf,
    check_run.check_weight_transport,
    redact.check_no_mask,
    check_learning.check_chat_template,
    check_learning.check_reward,
    check_learning.check_signal,
    check_learning.check_evaluation,
    check_learning.check_slime_flags,
    check_learning.check_dynamic_sampling,
    check_debug.check_debug,
    check_distillation.check_opd_has_rollouts,
    check_distillation.check_teacher_address,
    check_distillation.check_sampling_of_opd,
    check_distillation.check_divergence,
    check_distillation.check_opd_temperature,
    check_distillation.check_opd_coef_ramp,
    check_distillation.check_off_policy,
    check_distillation.check_distillation_weights,
)


def problems(config: Config, checks: Iterable[Check] = CHECKS) -> list[str]:
    """What is wrong, one sentence each; empty for a configuration that can run."""
    return [problem for check in checks for problem in check(config)]
