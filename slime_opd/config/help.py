"""The text of `--help`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from slime_opd.config.options import Option, options_of, stages_of
from slime_opd.errors import ConfigError

WIDTH = 44  # of the column of flags

USAGE = """\
usage: python -m slime_opd.train [--check] [--config FILE.yaml] [--flag value ...]

--check looks at everything that can go wrong, the data, the checkpoints and the teacher included, and starts nothing.
Every flag may also stand in the YAML file of --config; the command line wins."""

MEGATRON = """\
Megatron-core: its own options under their own names, or Megatron-LM's
  {} more flags: --help megatron"""

PASS_THROUGH = """\
SGLang: every other option of the engines
  --sglang-X [VALUE ...] is given to each engine as --X [VALUE ...]

  --help GROUP prints one group: """


def help_text(config_class: type, groups: Sequence[str] = (), width: int | None = None) -> str:
    """The help of all groups, or of `groups` (names of stages in Config), wrapped at `width` columns if given.

    Raises ConfigError for a group that is none of them.
    """
    options = options_of(config_class).values()
    stages = stages_of(config_class)
    if unknown := [group for group in groups if group not in stages]:
        raise ConfigError(f"--help: found {' '.join(unknown)!r}, expected groups of {', '.join(stages)}")
    chosen = [stage for stage in stages if stage in groups] or [stage for stage in stages if stage != "megatron"]
    parts = [] if groups else [USAGE]
    for stage in chosen:
        title = title_of(stages[stage])
        lines = [_line(option) for option in options if option.stage == stage]
        parts.append("\n".join([title, *lines]))
    if not groups:
        parts.append(MEGATRON.format(sum(option.stage == "megatron" for option in options)))
    return _wrapped("\n\n".join([*parts, PASS_THROUGH + ", ".join(stages)]), width)


def title_of(stage_class: type) -> str:
    """A stage's heading, with the conditions of all its options."""
    conditions = [f"only with {condition}" for condition in getattr(stage_class, "only_with", ())]
    title = (stage_class.__doc__ or stage_class.__name__).splitlines()[0]
    return f"{title} ({'; '.join(conditions)})" if conditions else title


def _wrapped(text: str, width: int | None) -> str:
    if width is None:
        return text
    lines = []
    for line in text.split("\n"):
        # Continuation lines are aligned with the help; on a narrow terminal, with the flag.
        indent = WIDTH + 2 if line.startswith("  --") and width >= 2 * WIDTH else 6 if line.startswith("  ") else 0
        lines += textwrap.wrap(
            line,
            width,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
        ) or [""]
    return "\n".join(lines)


def _line(option: Option) -> str:
    flag = f"  {option.flag} {placeholder(option)}".rstrip()
    details = [] if option.is_switch or option.default in (None, ()) else [f"default {format_value(option.default)}"]
    details += [] if option.declaration.within is None else [option.declaration.within.short]
    details += [f"only with {condition}" for condition in option.declaration.only_with]
    shown = f" ({'; '.join(details)})" if details else ""
    return f"{flag:<{WIDTH}}  {option.help}{shown}"


def placeholder(option: Option) -> str:
    """What stands for the option's value: `N`, `{a,b}`, `DIR`; empty for a switch."""
    if option.is_switch:
        return ""
    names = {int: "N", float: "X", str: "WORD"}
    one = option.declaration.metavar or ("{" + ",".join(option.choices) + "}" if option.choices else names[option.kind])
    return f"{one} ..." if option.many else one


def format_value(value: Any) -> str:
    """A default, for people: `unset`, `on`, `0.2`."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)
