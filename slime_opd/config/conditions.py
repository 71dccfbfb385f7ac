"""Conditions that options are declared with: `option(…, only_with=(is_set("save"),))`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Condition:
    """What has to hold in a Config for an option to have an effect.

    `text` completes "has no effect without …" and "only with …". `names` are the options that it reads, if those alone.
    """

    text: str
    holds: Callable[[Any], bool]
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text


def is_set(*names: str) -> Condition:
    """Any of these options is given, and is not 0 or false."""
    return Condition(" or ".join(map(flag, names)), lambda config: any(_value(config, name) for name in names), names)


def equals(name: str, value: str) -> Condition:
    """An option has this value."""
    return Condition(f"{flag(name)} {value}", lambda config: _value(config, name) == value, (name,))


def flag(name: str) -> str:
    """The command-line spelling of a field's name."""
    return "--" + name.replace("_", "-")


def _value(config: Any, name: str) -> Any:
    return next(getattr(stage, name) for stage in vars(config).values() if hasattr(stage, name))
