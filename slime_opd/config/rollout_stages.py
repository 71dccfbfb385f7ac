"""Options of what is generated: prompts, sampling, rewards, evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slime_opd.config.conditions import is_set
from slime_opd.config.distillation_stages import SGLANG_TEACHER
from slime_opd.config.options import option
from slime_opd.config.ranges import (
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_FRACTION,
    SECONDS,
    SEED,
    TEMPERATURE,
    TEMPERATURE_OR_GREEDY,
    TOP_K,
)
from slime_opd.config.resume import HONOURED, PROMPT_ORDER, RUN_LENGTH, SAME_PROMPTS, OnResume


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts"""

    on_resume: ClassVar[OnResume] = SAME_PROMPTS

    prompt_data: str | None = option(
        None,
        help="file of prompts: JSONL, a JSON array, CSV or Parquet; FILE@[a:b] is a slice of its rows",
        metavar="FILE",
    )
    input_key: str = option(
        "input", help="column of the prompt: a string or a list of chat messages; dots reach into nested columns"
    )
    label_key: str | None = option(None, help="column of the answer (with sft_loss: of the response)")
    metadata_key: str = option("metadata", help="column passed to custom rewards")
    apply_chat_template: bool = option(False, help="render the prompt with the tokenizer's chat template")
    apply_chat_template_kwargs: str = option(
        "{}",
        help="JSON object of arguments for the chat template",
        metavar="JSON",
        only_with=(is_set("apply_chat_template"),),
    )
    rollout_shuffle: bool = option(False, help="shuffle the prompts of each epoch", on_resume=PROMPT_ORDER)
    rollout_seed: int = option(
        42, help="seed of the shuffle and of the engines' sampling", within=SEED, on_resume=PROMPT_ORDER
    )
    rollout_max_prompt_len: int | None = option(
        None, help="drop longer prompts, in tokens; unset: keep all", within=POSITIVE
    )
    too_long_prompts: str = option(
        "refuse",
        choices=("refuse", "drop"),
        help="what to do with prompts (of training and evaluation) that leave no token of the context for a response, and with samples of sft_loss longer than the context or --max-tokens-per-gpu: refuse to start, or drop and count them",
    )
    max_row_bytes: int = option(
        16 * 1024 * 1024, help="largest row of a data file, in bytes; a larger one is refused", within=POSITIVE
    )
    num_epoch: int | None = option(None, help="epochs over the prompts; sets --num-rollout", within=POSITIVE)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Rollout: how the student generates"""

    on_resume: ClassVar[OnResume] = HONOURED

    num_rollout: int | None = option(
        None, help="rollouts of the run; 0: evaluate only", within=NOT_NEGATIVE, on_resume=RUN_LENGTH
    )
    rollout_batch_size: int | None = option(None, help="prompts per rollout", within=POSITIVE)
    n_samples_per_prompt: int = option(1, help="responses per prompt", within=POSITIVE)
    rollout_max_response_len: int | None = option(None, help="longest response, in tokens", within=POSITIVE)
    rollout_max_context_len: int | None = option(
        None, help="longest prompt plus response, in tokens; unset: the model's", within=POSITIVE
    )
    rollout_temperature: float = option(1.0, help="sampling temperature", within=TEMPERATURE)
    rollout_top_p: float = option(1.0, help="top-p (nucleus) sampling; 1: all tokens", within=POSITIVE_FRACTION)
    rollout_top_k: int = option(-1, help="most likely tokens to sample from; -1: all", within=TOP_K)
    rollout_stop: tuple[str, ...] = option((), help="strings that end a response")
    rollout_stop_token_ids: tuple[int, ...] = option(
        (), help="token ids that end a response, beside the end-of-sequence token"
    )
    sglang_server_concurrency: int = option(512, help="requests in flight per engine", within=POSITIVE)
    dynamic_sampling_filter_path: str | None = option(
        None,
        help="discard groups for which `(samples) -> bool`, or slime's `(args, samples)`, returns false, and generate others; slime's check_reward_nonzero_std is built in",
        metavar="MODULE.FUNCTION",
    )
    over_sampling_batch_size: int | None = option(
        None,
        help="prompts requested at a time; unset: --rollout-batch-size",
        only_with=(is_set("dynamic_sampling_filter_path"),),
    )
    rollout_function_path: str | None = option(
        None,
        help="accepted for slime's scripts: its sft_rollout.generate_rollout is built in as --loss-type sft_loss",
        metavar="MODULE.FUNCTION",
    )
    rollout_request_timeout_s: float = option(
        600.0, help="time limit of one generation request, in seconds", within=SECONDS
    )
    rollout_request_retries: int = option(8, help="retries of a failed generation request", within=NOT_NEGATIVE)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Reward"""

    on_resume: ClassVar[OnResume] = HONOURED

    rm_type: str | None = option(
        None,
        choices=("math", "deepscaler", "exact_match"),
        help="built-in verifier of a response against its label; unset: no task reward",
    )
    custom_rm_path: str | None = option(
        None,
        help="your reward: a function `(sample) -> float`, or slime's `(args, sample)`, async or not",
        metavar="MODULE.FUNCTION",
    )
    custom_function_timeout_s: float = option(
        60.0,
        help="time limit in seconds of the trial of --custom-rm-path and --dynamic-sampling-filter-path on made-up responses before the run; 0: no trial",
        within=NOT_NEGATIVE,
    )
    custom_reward_post_process_path: str | None = option(
        None,
        help="accepted for slime's scripts: its on_policy_distillation.post_process_rewards is built in",
        metavar="MODULE.FUNCTION",
    )
    rm_url: str | None = option(
        None,
        help="endpoint of the SGLang teacher, http://HOST:PORT/generate",
        metavar="URL",
        only_with=(SGLANG_TEACHER,),
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation"""

    on_resume: ClassVar[OnResume] = HONOURED

    eval_interval: int | None = option(
        None, help="rollouts between evaluations; unset: only before the first and after the last", within=POSITIVE
    )
    eval_prompt_data: tuple[str, ...] = option((), metavar="NAME FILE", help="pairs of a name and a file")
    skip_eval_before_train: bool = option(False, help="no evaluation before the first step")
    n_samples_per_eval_prompt: int = option(1, help="responses per evaluation prompt", within=POSITIVE)
    eval_temperature: float = option(0.0, help="sampling temperature; 0: greedy", within=TEMPERATURE_OR_GREEDY)
    eval_top_p: float = option(1.0, help="top-p (nucleus) sampling", within=POSITIVE_FRACTION)
    eval_top_k: int = option(-1, help="most likely tokens to sample from; -1: all", within=TOP_K)
    eval_max_response_len: int | None = option(
        None, help="longest response, in tokens; unset: --rollout-max-response-len", within=POSITIVE
    )
    eval_input_key: str | None = option(None, help="column of the prompt; unset: --input-key")
    eval_label_key: str | None = option(None, help="column of the answer; unset: --label-key")
    eval_rm_type: str | None = option(
        None, choices=("math", "deepscaler", "exact_match"), help="verifier; unset: --rm-type, or math"
    )
