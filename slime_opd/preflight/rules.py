"""All rules of a run: those of config/checks.py, and those about this machine's files, packages and memory.

They take less than a second: no file larger than a model's config.json is read, and nothing is imported or written.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from slime_opd.config import checks
from slime_opd.config.check_megatron import notes_of_model_flags
from slime_opd.config.checks import Check
from slime_opd.config.config import Config
from slime_opd.errors import ConfigError
from slime_opd.preflight import (
    check_architecture,
    check_files,
    check_kernels,
    check_lengths,
    check_packages,
    check_sglang,
    check_sizes,
)

RULES: tuple[Check, ...] = (
    *checks.CHECKS,
    check_files.check_checkpoints_exist,
    check_files.check_data_exists,
    check_files.check_recordings_exist,
    check_lengths.check_lengths,
    check_architecture.check_hf_config,
    check_architecture.check_layout_of_checkpoint,
    check_architecture.check_architecture_flags,
    check_architecture.check_top_k_of_vocabulary,
    check_sizes.check_rollout_fits,
    check_sizes.check_processes,
    check_sglang.check_sglang_options,
    check_kernels.check_rope_fusion,
    check_packages.check_engine,
    check_packages.check_flex_dispatcher,
    check_architecture.check_mixture,
    check_architecture.check_kind_of_model,
    check_packages.check_custom_functions,
    check_packages.check_wandb_is_installed,
)


def problems(config: Config, rules: Iterable[Check] = RULES) -> list[str]:
    """What is wrong, one sentence each; empty for a configuration that can run."""
    return checks.problems(config, rules)


def validate(config: Config) -> None:
    """Raise ConfigError with every problem, one line each, if there is any."""
    if found := problems(config):
        raise ConfigError("\n".join(found))


def notes(config: Config) -> list[str]:
    """Sentences for the start of a run about options that are valid but may surprise."""
    sentences = []
    rollout, checkpoint = config.rollout, config.checkpoint
    if config.teacher.fixed_temperature not in (None, rollout.rollout_temperature):
        sentences.append(
            f"--rollout-temperature {rollout.rollout_temperature}: an SGLang teacher always scores at temperature 1, so the trainer scores the student at temperature 1 too for the penalty"
        )
    is_group_of_one = rollout.n_samples_per_prompt == 1 and config.algorithm.advantage_estimator == "grpo"
    is_normalised = is_group_of_one and not config.algorithm.disable_rewards_normalization
    if config.opd.use_opd and config.has_reward and is_normalised:
        sentences.append(
            "--n-samples-per-prompt 1: group normalisation of a group of one gives 0, so only the teacher teaches"
        )
    if checkpoint.save is None and rollout.num_rollout != 0 and not config.debug.debug_rollout_only:
        sentences.append("no --save: no checkpoint is written, so a run that ends early is lost")
    is_continued = checkpoint.save is not None and _holds_checkpoint(checkpoint.save)
    if checkpoint.load is not None and not _holds_checkpoint(checkpoint.load) and not is_continued:
        start = "--ref-load" if checkpoint.ref_load is not None else "--hf-checkpoint"
        sentences.append(f"--load {checkpoint.load} holds no checkpoint yet: training starts from {start}")
    if config.cluster.colocate:
        sentences.append(
            "--colocate: trainer and engines keep their memory on the GPUs at the same time, as nothing releases it between rollouts; engines start once the trainers have loaded, and take --sglang-mem-fraction-static of what is free then, so set it low enough for the optimizer's state and the activations"
        )
    if config.debug.debug_rollout_only:
        sentences.append(
            "--debug-rollout-only: nothing is trained, --save and --load are not used, and the engines keep the weights of --hf-checkpoint"
        )
    if config.evaluation.eval_prompt_data and not config.evaluates:
        sentences.append("nothing is evaluated: training alone starts no engine")
    if note := _packing_note(config):
        sentences.append(note)
    if config.reward.custom_reward_post_process_path is not None:
        sentences.append("--custom-reward-post-process-path can go: what slime's hook does is built in")
    return sentences + notes_of_model_flags(config)


def _holds_checkpoint(directory: str) -> bool:
    names = ("latest_checkpointed_iteration.txt", "iter_*", "config.json")
    try:
        return any(file for name in names for file in Path(directory).glob(name))
    except OSError:  # a name that is too long, or a directory that may not be read: other rules report them
        return False


def _packing_note(config: Config) -> str | None:
    """A sentence if one response may be longer than a packed micro-batch; it is then a micro-batch of its own."""
    tokens, longest = config.training.max_tokens_per_gpu, config.rollout.rollout_max_response_len
    if not config.training.use_dynamic_batch_size or tokens is None or longest is None or tokens >= longest:
        return None
    return f"--max-tokens-per-gpu {tokens} is less than --rollout-max-response-len {longest}: a longer sample is a micro-batch of its own, and takes the memory of its own length"
