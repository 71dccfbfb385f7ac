"""The table of benchmarks/objectives.sh, one row for each run that is finished, and a picture of some of them.

python benchmarks/objectives.py OUTPUT TEACHER_RUN
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean, median

from slime_opd.observe.report import accuracy_curves, curve, plot_runs, read_metrics

_HEADER = (
    "objective",
    "accuracy after",
    "mean of the last five",
    "rollouts to 90% of the teacher",
    "reverse KL last",
    "seconds per step",
    "bytes per token",
)

# One of each kind: more curves than these could not be told apart.
_PLOTTED = ("penalty_megatron", "reverse_kl", "forward_kl", "jsd", "reverse_kl_top_student", "token_reward")


def row(name: str, run_dir: Path, goal: float) -> list[str]:
    """The cells of one run; a cell without a measurement is a dash."""
    records = read_metrics(run_dir)
    (steps, accuracies) = next(iter(accuracy_curves(records).values()))
    reached = [step for step, accuracy in zip(steps, accuracies, strict=True) if accuracy >= goal]
    kl, seconds = curve(records, "opd/reverse_kl")[1], curve(records, "perf/step_time")[1]
    traffic = curve(records, "perf/teacher_bytes_per_token")[1]
    return [
        name,
        f"{accuracies[-1]:.1%}",
        f"{mean(accuracies[-5:]):.1%}",
        f"{reached[0]:.0f}" if reached else f"not in {steps[-1]:.0f}",
        f"{mean(kl[-5:]):.3f}" if kl else "—",
        f"{median(seconds):.2f}",
        f"{median(traffic):.0f}" if traffic else "—",
    ]


def main(output: Path, teacher: Path) -> None:
    """Print the table as Markdown, and write it and the picture beside the runs."""
    (_, teachers) = next(iter(accuracy_curves(read_metrics(teacher)).values()))
    runs = sorted(
        (path for path in output.iterdir() if (path / "metrics.jsonl").is_file() and path.suffix != ".partial"),
        key=lambda path: path.stat().st_ctime,
    )
    lines = [_HEADER, ["---"] * len(_HEADER), *(row(path.name, path, 0.9 * teachers[-1]) for path in runs)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    (output / "table.md").write_text(table + "\n")
    plot_runs({path.name: path for path in runs if path.name in _PLOTTED}, output / "objectives.png")
    print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
