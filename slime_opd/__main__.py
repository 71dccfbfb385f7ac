# PYTHON_ARGCOMPLETE_OK
"""`python -m slime_opd`, or `slime_opd` if it is installed: the commands, and shell completion of their flags."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass

from slime_opd.commands import check, report, train
from slime_opd.config.config import Config
from slime_opd.config.megatron_options import NAMES
from slime_opd.config.options import options_of
from slime_opd.config.output import print_text
from slime_opd.config.parser import command_line
from slime_opd.errors import ConfigError


@dataclass(frozen=True)
class Command:
    """One command: a line of help, the function that runs it, and whether it takes the flags of a run."""

    help: str
    run: Callable[[list[str]], object]
    takes_flags: bool = True


COMMANDS = {
    "train": Command(train.HELP, train.run),
    "check": Command(check.HELP, check.run),
    "report": Command(report.HELP, report.run, takes_flags=False),
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


def main(argv: list[str]) -> None:
    """Run the command that the first argument names."""
    if not argv or argv[0] in ("--help", "-h"):
        print_text(USAGE)
        return
    if argv[0] not in COMMANDS:
        raise ConfigError(f"found the command {argv[0]!r}, expected one of {', '.join(COMMANDS)}")
    COMMANDS[argv[0]].run(argv[1:])


def complete() -> None:
    """Answer a shell's request for completions and leave the process; return at once if there is none."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    parser = argparse.ArgumentParser(add_help=False)
    subparsers = parser.add_subparsers()
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name)
        if not command.takes_flags:
            subparser.add_argument("arguments", nargs="*")
            continue
        for option in options_of(Config).values():
            arguments = {"action": "store_true"} if option.is_switch else {"choices": option.choices or None}
            subparser.add_argument(option.flag, **arguments)
        for flag in NAMES:
            subparser.add_argument(flag)
    argcomplete.autocomplete(parser)


def entry() -> None:
    """The console script."""
    complete()
    command_line(main)


if __name__ == "__main__":
    entry()
