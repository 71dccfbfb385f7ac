"""`slime_opd train FLAGS`: train a model."""

from __future__ import annotations

from slime_opd import train

HELP = "train: --help lists the flags by purpose"


def run(argv: list[str]) -> None:
    """Train; the same as `python -m slime_opd.train`."""
    train.main(argv)
