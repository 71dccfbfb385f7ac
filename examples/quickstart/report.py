"""The quickstart's summary: a table on the terminal, and a picture of accuracy and reverse KL against steps."""

from __future__ import annotations

import sys
from pathlib import Path

from slime_opd.observe.report import plot_runs, summary_table

RUNS = {
    "OPD, SGLang teacher": "opd_sglang",
    "OPD, Megatron teacher": "opd_megatron",
    "GRPO, task reward": "grpo",
}


def main(work: Path) -> None:
    """Print the table and write WORK/report.md and WORK/report.png."""
    runs = {name: work / directory for name, directory in RUNS.items()}
    table = summary_table({**runs, "the teacher": work / "teacher_evaluated"})
    (work / "report.md").write_text(table + "\n")
    plot_runs(runs, work / "report.png")
    print(table)
    print(f"\npicture: {work / 'report.png'}\ntable:   {work / 'report.md'}\ncurves:  tensorboard --logdir {work}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
