"""The context of a run: the tokens that a prompt and its response share."""

from __future__ import annotations

from slime_opd.config.config import Config
from slime_opd.config.hf_config import context_length_of, language_model, read_hf_config
from slime_opd.errors import ConfigError


def context_length(config: Config) -> int | None:
    """Tokens of prompt plus response: `--rollout-max-context-len`, else the limit of the model and its engines, or
    None.

    Raises ConfigError where the model's config.json is not JSON.
    """
    return config.rollout.rollout_max_context_len or limit_of_model(config)[0]


def limit_of_model(config: Config) -> tuple[int | None, str]:
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
