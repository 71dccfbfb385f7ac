"""Rules between options: data, rollout, reward, evaluation, algorithm."""

from __future__ import annotations

import json

from slime_opd.config.config import Config
from slime_opd.config.options import flag

SLIME_FILTER = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
SLIME_SFT_ROLLOUT = "slime.rollout.sft_rollout.generate_rollout"
SLIME_POST_PROCESS_HOOK = "slime.rollout.on_policy_distillation.post_process_rewards"


def check_required(config: Config) -> list[str]:
    """Options without which there is no run. `--num-rollout 0` evaluates and trains nothing."""
    rollout, data = config.rollout, config.data
    needed: list[tuple[str, object, str]] = [
        ("--hf-checkpoint", config.model.hf_checkpoint, "the Hugging Face directory of the student")
    ]
    if not only_evaluates(config):
        length = None if config.is_sft else "the longest response, in tokens"
        needed += [
            (
                "--prompt-data",
                data.prompt_data or config.debug.load_debug_rollout_data,
                "a JSONL or Parquet file of prompts",
            ),
            ("--num-rollout", rollout.num_rollout or data.num_epoch, "the rollouts of the run (or give --num-epoch)"),
            ("--rollout-batch-size", rollout.rollout_batch_size, "the prompts of one rollout"),
        ]
        if length:
            needed.append(("--rollout-max-response-len", rollout.rollout_max_response_len, length))
    return [f"{name}: found none, expected {expected}" for name, value, expected in needed if value is None]


def check_length_of_run(config: Config) -> list[str]:
    """Two lengths of one run."""
    if config.rollout.num_rollout is not None and config.data.num_epoch is not None:
        return ["--num-rollout and --num-epoch: found both, expected one"]
    return []


def check_chat_template(config: Config) -> list[str]:
    """Arguments of the chat template that are no JSON object."""
    text = config.data.apply_chat_template_kwargs
    try:
        arguments = json.loads(text)
    except json.JSONDecodeError:
        arguments = None
    return (
        [] if isinstance(arguments, dict) else [f"--apply-chat-template-kwargs: found {text!r}, expected a JSON object"]
    )


def check_reward(config: Config) -> list[str]:
    """Rewards that exclude each other, or that nothing could be compared with."""
    reward = config.reward
    problems = []
    if reward.rm_type is not None and reward.custom_rm_path is not None:
        problems.append("--rm-type and --custom-rm-path: found both, expected one reward")
    if reward.rm_type is not None and config.data.label_key is None and not only_evaluates(config):
        problems.append(
            f"--rm-type {reward.rm_type} needs --label-key: without the column of the answers every reward would be 0"
        )
    hook = reward.custom_reward_post_process_path
    if hook not in (None, SLIME_POST_PROCESS_HOOK):
        problems.append(
            f"--custom-reward-post-process-path: found {hook!r}, expected none: only {SLIME_POST_PROCESS_HOOK} is accepted, and built in"
        )
    return problems


def check_signal(config: Config) -> list[str]:
    """A policy loss with nothing to learn from."""
    if config.is_sft or only_evaluates(config) or config.opd.use_opd:
        return []
    if not config.has_reward:
        return [
            "nothing to learn from: found neither a reward (--rm-type, --custom-rm-path) nor a teacher (--use-opd), expected at least one"
        ]
    alone = config.rollout.n_samples_per_prompt == 1 and config.algorithm.advantage_estimator == "grpo"
    if alone and not config.algorithm.disable_rewards_normalization:
        return [
            "--n-samples-per-prompt 1 with --advantage-estimator grpo: a reward minus the mean of its group of one is always 0; sample more responses, or give --disable-rewards-normalization or --use-opd"
        ]
    return []


def check_evaluation(config: Config) -> list[str]:
    """Evaluation data that is missing, not in pairs, or without answers."""
    evaluation, values = config.evaluation, config.evaluation.eval_prompt_data
    problems = []
    if not values:
        if only_evaluates(config):
            problems.append("--num-rollout 0 only evaluates: found no --eval-prompt-data, expected NAME FILE pairs")
        elif evaluation.eval_interval is not None:
            problems.append("--eval-interval needs --eval-prompt-data: NAME FILE pairs to evaluate on")
        return problems
    if len(values) % 2:
        problems.append(f"--eval-prompt-data: found {len(values)} values {list(values)}, expected pairs of NAME FILE")
    names = values[::2]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"--eval-prompt-data: found the name {', '.join(repeated)} twice, expected a name per file")
    if config.reward.custom_rm_path is None and not (evaluation.eval_label_key or config.data.label_key):
        problems.append(
            "--eval-prompt-data needs --eval-label-key or --label-key: without the column of the answers every score would be 0"
        )
    if evaluation.eval_max_response_len is None and config.rollout.rollout_max_response_len is None:
        problems.append(
            "--eval-prompt-data needs --eval-max-response-len or --rollout-max-response-len: the longest response, in tokens"
        )
    return problems


def only_evaluates(config: Config) -> bool:
    """Whether the run trains nothing."""
    return config.rollout.num_rollout == 0


# slime's layer specs that need none here: Megatron's flags describe the layers.
SLIME_SPECS = ("slime_plugins.models.glm4",)


def check_slime_flags(config: Config) -> list[str]:
    """slime's flags, accepted when they match built-in behaviour."""
    problems, function = [], config.rollout.rollout_function_path
    if function not in (None, SLIME_SFT_ROLLOUT):
        problems.append(
            f"--rollout-function-path: found {function!r}, expected {SLIME_SFT_ROLLOUT}: custom rollout functions are not supported; a custom reward is (--custom-rm-path)"
        )
    spec = config.model.spec
    if spec and spec[0] not in SLIME_SPECS:
        problems.append(
            f"--spec: found {' '.join(spec)!r}, expected {' or '.join(SLIME_SPECS)}: layers come from the model family (docs/models.md lists those that there are)"
        )
    only_sft = {
        "rollout_function_path": function == SLIME_SFT_ROLLOUT,
        "disable_compute_advantages_and_returns": config.algorithm.disable_compute_advantages_and_returns,
    }
    problems += [
        f"{flag(name)} is for supervised fine-tuning: add --loss-type sft_loss, or drop it"
        for name, is_given in only_sft.items()
        if is_given and not config.is_sft
    ]
    if config.algorithm.kl_coef:
        problems.append(
            f"--kl-coef {config.algorithm.kl_coef}: GRPO takes the KL to the reference as a loss; use --use-kl-loss --kl-loss-coef {config.algorithm.kl_coef}"
        )
    return problems


def check_dynamic_sampling(config: Config) -> list[str]:
    """A filter of groups without rewards to filter by, or with options that contradict it."""
    rollout, problems = config.rollout, []
    path, over_sampling = rollout.dynamic_sampling_filter_path, rollout.over_sampling_batch_size
    if path is None:
        return []
    if not config.has_reward:
        problems.append("--dynamic-sampling-filter-path needs a reward (--rm-type, --custom-rm-path) to tell groups by")
    if rollout.n_samples_per_prompt == 1:
        problems.append("--dynamic-sampling-filter-path with --n-samples-per-prompt 1: a group of one has one reward")
    if over_sampling is not None and over_sampling < (rollout.rollout_batch_size or 1):
        problems.append(
            f"--over-sampling-batch-size: found {over_sampling}, expected at least --rollout-batch-size {rollout.rollout_batch_size}"
        )
    if config.divergence.opd_off_policy_unit == "rollouts":
        problems.append(
            "--opd-off-policy-unit rollouts with --dynamic-sampling-filter-path: a rollout's prompts are not known before it; use samples"
        )
    return problems
