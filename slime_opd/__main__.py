# PYTHON_ARGCOMPLETE_OK
"""`python -m slime_opd`, or `slime_opd` where it is installed: the commands, with completion of their flags in a shell."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slime_opd import train
from slime_opd.config.config import Config
from slime_opd.config.megatron_options import NAMES
from slime_opd.config.options import options_of
from slime_opd.config.output import print_text
from slime_opd.config.parser import command_line
from slime_opd.errors import ConfigError, SlimeOPDError


@dataclass(frozen=True)
class Command:
    """What it does, in a line, and how."""

    help: str
    run: Callable[[list[str]], object]


def report(words: list[str]) -> None:
    """Print a table of runs, by their --run-dir, and write a picture of them: report RUN_DIR… [PICTURE.png]"""
    pictures = [word for word in words if word.endswith(".png")]
    runs = {Path(word).name: Path(word) for word in words if word not in pictures}
    if not runs or len(pictures) > 1:
        raise ConfigError(
            f"report: found {' '.join(words) or 'nothing'!r}, expected RUN_DIR… and at most one PICTURE.png"
        )
    from slime_opd.observe.report import plot_runs, summary_table

    try:
        print_text(summary_table(runs))
        for picture in pictures:
            plot_runs(runs, Path(picture))
    except SlimeOPDError as error:
        raise ConfigError(str(error)) from error


COMMANDS = {
    "train": Command("train: --help lists the flags by purpose", train.main),
    "check": Command("look at everything about a run, with the flags of train, and start nothing", train.check),
    "report": Command("a table of finished runs, and a picture: report RUN_DIR… [PICTURE.png]", report),
}

USAGE = "\n".join(
    [
        "usage: python -m slime_opd COMMAND …",
        "",
        *(f"  {name:<8} {command.help}" for name, command in COMMANDS.items()),
        "",
        "Conversions between Hugging Face and Megatron checkpoints are scripts in tools/.",
        'Completion in bash: eval "$(register-python-argcomplete slime_opd)"',
    ]
)


def main(words: list[str]) -> None:
    """Run the command that the first word names."""
    if not words or words[0] in ("--help", "-h"):
        print_text(USAGE)
        return
    if words[0] not in COMMANDS:
        raise ConfigError(f"found the command {words[0]!r}, expected one of {', '.join(COMMANDS)}")
    COMMANDS[words[0]].run(words[1:])


def complete() -> None:
    """Answer a shell that asks what may follow, and leave the process; return at once where none asks."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    parser = argparse.ArgumentParser(add_help=False)
    commands = parser.add_subparsers()
    for name in COMMANDS:
        command = commands.add_parser(name)
        if name == "report":
            command.add_argument("words", nargs="*")
            continue
        for option in options_of(Config).values():
            taking = {"action": "store_true"} if option.is_switch else {"choices": option.choices or None}
            command.add_argument(option.flag, **taking)
        for flag in NAMES:
            command.add_argument(flag)
    argcomplete.autocomplete(parser)


def entry() -> None:
    """The console script."""
    complete()
    command_line(main)


if __name__ == "__main__":
    entry()
