"""Lengths in tokens: the context that prompt and response share, and rules about the options that limit them."""

from __future__ import annotations

from slime_opd.config.config import Config
from slime_opd.config.hf_config import context_length_of, language_model, read_hf_config
from slime_opd.config.options import flag
from slime_opd.errors import ConfigError


def context_length(config: Config) -> int | None:
    """Tokens of prompt plus response: `--rollout-max-context-len`, else what the model and its engines take; None if no file or flag names it.

    Raises ConfigError where the model's config.json is not JSON.
    """
    return config.rollout.rollout_max_context_len or _limit_of_model(config)[0]


def check_lengths(config: Config) -> list[str]:
    """Responses longer than the context, and a context longer than the model's."""
    try:
        limit, source = _limit_of_model(config)
        context = context_length(config)
    except ConfigError:
        return []  # the check of --hf-checkpoint reports a config.json that is not JSON
    problems, chosen = [], config.rollout.rollout_max_context_len
    if limit is not None and chosen is not None and chosen > limit:
        problems.append(
            f"--rollout-max-context-len: found {chosen}, expected at most the {limit} tokens of {source}: the engines refuse longer requests (--sglang-context-length raises their limit, where the model extrapolates)"
        )
    where = "--rollout-max-context-len" if chosen is not None else source
    for name, value in (
        ("rollout_max_response_len", config.rollout.rollout_max_response_len),
        ("eval_max_response_len", config.evaluation.eval_max_response_len),
    ):
        if context is not None and value is not None and value > context:
            problems.append(
                f"{flag(name)}: found {value}, expected at most the {context} tokens that prompt and response share ({where})"
            )
    return problems


def _limit_of_model(config: Config) -> tuple[int | None, str]:
    """Longest sequence that the model and its engines take, in tokens, and the option or file that sets it."""
    engine = config.sglang.get("context-length", ())
    if len(engine) == 1 and engine[0].isdigit():
        return int(engine[0]), "--sglang-context-length"
    if config.model.max_position_embeddings is not None:
        return config.model.max_position_embeddings, "--max-position-embeddings"
    try:
        model = language_model(read_hf_config(config.model.hf_checkpoint))
    except ValueError as error:
        raise ConfigError(f"--hf-checkpoint: {error}") from error
    length = context_length_of(model)
    return length, "" if length is None else f"{config.model.hf_checkpoint}/config.json (max_position_embeddings)"
