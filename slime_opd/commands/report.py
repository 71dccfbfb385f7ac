"""`slime_opd report RUN_DIR… [PICTURE.png]`: compare finished runs."""

from __future__ import annotations

from pathlib import Path

from slime_opd.config.output import print_text
from slime_opd.errors import ConfigError, SlimeOPDError

HELP = "a table of finished runs, and a picture: report RUN_DIR… [PICTURE.png]"


def run(argv: list[str]) -> None:
    """Print a table of the runs in these --run-dir directories, and write a picture of them if one is named."""
    pictures = [argument for argument in argv if argument.endswith(".png")]
    runs = {Path(argument).name: Path(argument) for argument in argv if argument not in pictures}
    if not runs or len(pictures) > 1:
        raise ConfigError(
            f"report: found {' '.join(argv) or 'nothing'!r}, expected RUN_DIR… and at most one PICTURE.png"
        )
    from slime_opd.observe.report import plot_runs, summary_table

    try:
        print_text(summary_table(runs))
        for picture in pictures:
            plot_runs(runs, Path(picture))
    except SlimeOPDError as error:
        raise ConfigError(str(error)) from error
