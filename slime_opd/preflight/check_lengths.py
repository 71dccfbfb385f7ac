"""Rules about the options that limit lengths, against the context of the model."""

from __future__ import annotations

from slime_opd.config.config import Config
from slime_opd.config.lengths import context_length, limit_of_model
from slime_opd.config.options import flag
from slime_opd.errors import ConfigError


def check_lengths(config: Config) -> list[str]:
    """Responses longer than the context, and a context longer than the model's."""
    try:
        limit, source = limit_of_model(config)
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
