"""The record in a checkpoint of the run that wrote it: the requested start, the run's identity, its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime_opd.checkpoint.start import Request
from slime_opd.config import Config
from slime_opd.config.hf_config import ARCHITECTURE_KEYS, language_model, read_hf_config
from slime_opd.config.options import options_of
from slime_opd.config.redact import redact_value
from slime_opd.errors import ConfigError

# Increased when the meaning of a recorded value changes.
FORMAT = 1


def identity_of(config: Config, prompts: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a run, as JSON values: architecture, loss type and prompts.

    Runs that differ here cannot resume from one another.

    `prompts`: `PromptSource.identity()`; {} where the prompts are not read.
    """
    identity: dict[str, Any] = {
        "architecture": _architecture(config.model.hf_checkpoint),
        "loss_type": config.training.loss_type,
    }
    if prompts:
        identity["prompts"] = {name: prompts[name] for name in ("rows", "fingerprint")}
    return identity


def _architecture(hf_checkpoint: str | None) -> dict[str, Any]:
    try:
        config = language_model(read_hf_config(hf_checkpoint))
    except ValueError as error:
        raise ConfigError(f"--hf-checkpoint: {error}") from error
    return {key: config[key] for key in ARCHITECTURE_KEYS if key in config}


def public_values(config: Config) -> dict[str, Any]:
    """All options as JSON values, by name, without passwords, keys, and unset options of Megatron and SGLang."""
    values: dict[str, Any] = {}
    for option in options_of(Config).values():
        value = option.read(config)
        if option.stage != "megatron" or value not in (None, ()):
            values[option.name] = list(value) if isinstance(value, tuple) else value
    values |= {f"sglang-{name}": list(arguments) for name, arguments in config.sglang.items()}
    return {name: redact_value(name, value) for name, value in values.items()}


def run_record(config: Config, request: Request, identity: Mapping[str, Any], made_by: str) -> dict[str, Any]:
    """The `run` section of run_state.json. `made_by`: the reason of the save, from `saves.py`."""
    return {
        "format": FORMAT,
        "made_by": made_by,
        "request": request.recorded(),
        "identity": dict(identity),
        "options": public_values(config),
    }
