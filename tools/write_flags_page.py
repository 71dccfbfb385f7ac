"""Write docs/flags.md from the declarations of the options: python tools/write_flags_page.py"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from slime_opd.config.config import Config
from slime_opd.config.help import format_value, placeholder, title_of
from slime_opd.config.options import Option, flag, options_of, stages_of

PAGE = Path(__file__).parents[1] / "docs" / "flags.md"

HEAD = """\
# Flags

Every option of a run, as `--help` prints it. This page is written by `python tools/write_flags_page.py` from the declarations in
`slime_opd/config/*stages.py`; a test keeps it up to date. Options of Megatron-core under their own names are in [megatron.md](megatron.md);
`--sglang-X` is passed to the SGLang engines as `--X`.

*Only with* is what an option has no effect without; *needs* is what must be given with it. Both are checked before a run starts, as are ranges.
A resumed run honours a changed option, or refuses it: see [checkpoints.md](checkpoints.md).
"""


def flags_page() -> str:
    """The page: one table for each stage."""
    options = options_of(Config).values()
    parts = [HEAD]
    for stage, stage_class in stages_of(Config).items():
        if stage == "megatron":
            continue
        rows = [_row(option) for option in options if option.stage == stage]
        heading = "| flag | default | range | only with, needs | if changed on resume | what it does |"
        parts.append(
            "\n".join([f"## {title_of(stage_class)}\n", heading, "| --- | --- | --- | --- | --- | --- |", *rows, ""])
        )
    return "\n".join(parts)


def _row(option: Option) -> str:
    declaration = option.declaration
    default = "" if option.is_switch or option.default in (None, ()) else f"`{format_value(option.default)}`"
    within = "" if declaration.within is None else declaration.within.short
    depends = "; ".join([*(f"only with {condition}" for condition in declaration.only_with), *_needs(option)])
    resume = "refused" if option.on_resume.is_refused else "honoured" if option.on_resume.is_compared else ""
    cells = (f"`{option.flag} {placeholder(option)}`".replace(" `", "`"), default, within, depends, resume, option.help)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _needs(option: Option) -> list[str]:
    needs = option.declaration.needs
    by_value = needs if isinstance(needs, Mapping) else {"": needs} if needs else {}
    return [
        f"{f'{value}: ' if value else ''}needs {' and '.join(map(flag, names))}" for value, names in by_value.items()
    ]


if __name__ == "__main__":
    PAGE.write_text(flags_page(), encoding="utf-8")
