"""Whether the options of a run fit together and fit this machine.

A rule is a pure function `check_…(config) -> list of sentences` and a row of CHECKS. Rules
never edit the configuration, and all of them run, so a user reads all problems at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from slime_opd.config import (
    check_debug,
    check_distillation,
    check_kernels,
    check_learning,
    check_lengths,
    check_machine,
    check_megatron,
    check_options,
    check_run,
    check_sglang,
    check_sizes,
    redact,
)
from slime_opd.config.config import Config
from slime_opd.errors import ConfigError

Check = Callable[[Config], list[str]]

# Rules that need nothing but the configuration.
COMBINATIONS: tuple[Check, ...] = (
    check_options.check_ranges,
    check_options.check_effects,
    check_options.check_needs,
    check_learning.check_required,
    check_learning.check_length_of_run,
    check_run.check_model,
    check_run.check_layout,
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
    check_learning.check_words_of_slime,
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

CHECKS: tuple[Check, ...] = (
    *COMBINATIONS,
    check_machine.check_checkpoints_exist,
    check_machine.check_data_exists,
    check_debug.check_recordings_exist,
    check_lengths.check_lengths,
    check_machine.check_hf_config,
    check_machine.check_layout_of_checkpoint,
    check_machine.check_architecture_flags,
    check_machine.check_top_k_of_vocabulary,
    check_sizes.check_rollout_fits,
    check_sizes.check_processes,
    check_sglang.check_sglang_options,
    check_machine.check_context_parallel,
    check_kernels.check_rope_fusion,
    check_megatron.check_engine,
    check_megatron.check_flex_dispatcher,
    check_machine.check_mixture,
    check_megatron.check_kind_of_model,
    check_machine.check_custom_functions,
    check_machine.check_wandb_is_installed,
)


def problems(config: Config, checks: Iterable[Check] = CHECKS) -> list[str]:
    """What is wrong, one sentence each; empty for a configuration that can run."""
    return [problem for check in checks for problem in check(config)]


def validate(config: Config) -> None:
    """Raise ConfigError with every problem, one line each, if there is any."""
    if found := problems(config):
        raise ConfigError("\n".join(found))


def notes(config: Config) -> list[str]:
    """What is not wrong, but worth saying at the start of a run."""
    said = []
    rollout, checkpoint = config.rollout, config.checkpoint
    if config.teacher.fixed_temperature not in (None, rollout.rollout_temperature):
        said.append(
            f"--rollout-temperature {rollout.rollout_temperature}: an SGLang teacher scores at temperature 1 whatever it is asked for, so the trainer scores the student at temperature 1 too for the penalty"
        )
    is_group_of_one = rollout.n_samples_per_prompt == 1 and config.algorithm.advantage_estimator == "grpo"
    is_normalised = is_group_of_one and not config.algorithm.disable_rewards_normalization
    if config.opd.use_opd and config.has_reward and is_normalised:
        said.append(
            "--n-samples-per-prompt 1: group normalisation of a group of one gives 0, so only the teacher teaches"
        )
    if checkpoint.save is None and rollout.num_rollout != 0 and not config.debug.debug_rollout_only:
        said.append("no --save: no checkpoint is written, so a run that ends early is lost")
    is_continued = checkpoint.save is not None and _holds_checkpoint(checkpoint.save)
    if checkpoint.load is not None and not _holds_checkpoint(checkpoint.load) and not is_continued:
        start = "--ref-load" if checkpoint.ref_load is not None else "--hf-checkpoint"
        said.append(f"--load {checkpoint.load} holds no checkpoint yet: training starts from {start}")
    if config.cluster.colocate:
        said.append(
            "--colocate: trainer and engines keep their memory on the GPUs at the same time, as nothing releases it between rollouts; engines start once the trainers have loaded, and take --sglang-mem-fraction-static of what is free then, so set it low enough for the optimizer's state and the activations"
        )
    if config.debug.debug_rollout_only:
        said.append(
            "--debug-rollout-only: nothing is trained, --save and --load are not used, and the engines keep the weights of --hf-checkpoint"
        )
    if config.evaluation.eval_prompt_data and not config.evaluates:
        said.append("nothing is evaluated: training alone starts no engine")
    if note := check_sizes.packing_note(config):
        said.append(note)
    if config.reward.custom_reward_post_process_path is not None:
        said.append("--custom-reward-post-process-path can go: what slime's hook does is built in")
    return said + check_megatron.notes_of_model_flags(config)


def _holds_checkpoint(directory: str) -> bool:
    names = ("latest_checkpointed_iteration.txt", "iter_*", "config.json")
    try:
        return any(file for name in names for file in Path(directory).glob(name))
    except OSError:  # a name that is too long, or a directory that may not be read: other rules report them
        return False
