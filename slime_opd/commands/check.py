"""`slime_opd check FLAGS`: check a run before it starts."""

from __future__ import annotations

from typing import NoReturn

from slime_opd import train

HELP = "look at everything about a run, with the flags of train, and start nothing"


def run(argv: list[str]) -> NoReturn:
    """Check the run that the flags describe; the exit code is 2 if there is a problem."""
    train.check(argv)
