"""Secrets among the options: sent to the servers they are for, never written or printed. Pure.

A secret is the user info of a URL (`http://USER:PASSWORD@HOST`), or the value of an option named like a key or a
password, such as SGLang's `--api-key`. All output of options (config.yaml, metrics services, messages) is redacted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from slime_opd.config.config import Config
from slime_opd.config.options import options_of

MASK = "***"

# Up to the last "@" of the URL: a password with an unescaped slash is still a password.
_USER_INFO = re.compile(r"(https?://)\S*@", re.IGNORECASE)
_SECRET_NAME = re.compile(r"(api|wandb)[-_]key$|password$|secret$|(auth|access|hf)[-_]token$")


def redact_urls(text: str) -> str:
    """`text` with the user info of every http URL replaced: `http://***@HOST`."""
    return _USER_INFO.sub(rf"\g<1>{MASK}@", text)


def redact_value(name: str, value: Any) -> Any:
    """The value of option `name` without its secrets; lists, tuples and mappings are redacted inside."""
    if isinstance(value, str):
        return MASK if value and _SECRET_NAME.search(name) else redact_urls(value)
    if isinstance(value, list | tuple):
        return type(value)(redact_value(name, item) for item in value)
    if isinstance(value, Mapping):
        return {key: redact_value(str(key), item) for key, item in value.items()}
    return value


def redacted(config: Config) -> Config:
    """`config` without secrets, for whatever writes or compares options."""
    stages: dict[str, Any] = {"sglang": redact_value("sglang", config.sglang)}
    for option in options_of(Config).values():
        value = option.read(config)
        if (safe := redact_value(option.name, value)) != value:
            stage = stages.get(option.stage, getattr(config, option.stage))
            stages[option.stage] = dataclasses.replace(stage, **{option.name: safe})
    return dataclasses.replace(config, **stages)


def check_no_mask(config: Config) -> list[str]:
    """Values that come from a redacted file: the secret itself has to be given again."""
    values = {option.flag: option.read(config) for option in options_of(Config).values()}
    values |= {f"--sglang-{name}": value for name, value in config.sglang.items()}
    return [
        f"{name}: found {MASK!r} where a secret belongs: config.yaml keeps none; give the option again beside --config"
        for name, value in values.items()
        if any(item == MASK or f"://{MASK}@" in item for item in _strings(value))
    ]


def _strings(value: Any) -> list[str]:
    items = value if isinstance(value, list | tuple) else [value]
    return [item for item in items if isinstance(item, str)]
