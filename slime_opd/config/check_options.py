"""Checks of single options against their declarations: numbers, what they need, and whether they have an effect."""

from __future__ import annotations

from slime_opd.config.config import Config
from slime_opd.config.options import Option, options_of


def check_ranges(config: Config) -> list[str]:
    """Numbers outside the range of their option."""
    problems = []
    for option in options_of(Config).values():
        within, value = option.declaration.within, option.read(config)
        if within is None or value is None or value in within:
            continue
        problems.append(f"{option.flag}{_alias(option)}: found {value}, expected {within.expected(value)}")
    return problems


def check_effects(config: Config) -> list[str]:
    """Options that have no effect, because a condition of theirs does not hold."""
    return [
        f"{_shown(option, config)} has no effect without {condition}"
        for option in options_of(Config).values()
        if option.is_given(config) and (condition := option.unmet_condition(config)) is not None
    ]


def check_needs(config: Config) -> list[str]:
    """Options that need another one, which is not set."""
    problems = []
    for option in options_of(Config).values():
        if not option.is_given(config) or option.unmet_condition(config) is not None:
            continue
        missing = option.missing_needs(config)
        if missing:
            explained = f": {missing[0].help}" if len(missing) == 1 else ""
            flags = " and ".join(other.flag for other in missing)
            problems.append(f"{_shown(option, config)} needs {flags}{explained}")
    return problems


def _shown(option: Option, config: Config) -> str:
    """The flag, with its value where that is short and no secret: a number or a choice."""
    value = option.read(config)
    is_text = option.kind is str and not option.choices
    return option.flag + _alias(option) if is_text else option.format_flag(value)


def _alias(option: Option) -> str:
    names = [alias for alias, implied in option.declaration.aliases if implied is None]
    return f" ({names[0]})" if names else ""
