"""Kill every kind of process of real training runs, and check that no process is left and no step is lost.

    python tools/fault_drill.py --kills 100 --seed 0

Starts tiny runs on this machine's CPU (supervised fine-tuning on one and two ranks; GRPO with reward workers;
distillation from an SGLang teacher; two engines behind a router), kills one of their processes at a random moment, and
starts the same command again. After each kill it checks that the run ended in time with the documented exit code and
message, or survived; that no process and no shared memory is left; and that the next start resumes from the last
checkpoint. A fine-tuning run that was killed several times must end with the same tensors, bit for bit, as one that was
not. The exit code is 1 if a check fails. No GPU and no network is needed.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from drill.kinds import ALL_STACKS, KINDS, on_stacks
from drill.plan import batches, plan
from drill.results import FINISHED, ResultFile, table


def main(argv: list[str]) -> int:
    """Run the drill; returns the exit code."""
    options = parse_arguments(argv)
    kinds = on_stacks([KINDS[name] for name in options.kinds], options.stacks)
    trials = plan(options.kills, options.seed, kinds)
    if options.list:
        for trial in trials:
            where = f"{trial.phase.value!r} of {trial.stack}"
            print(f"{trial.number}: {trial.kind.name} in {where}, after {trial.after} steps")
        return 0
    from drill.campaign import Campaign

    # Like Ctrl-C: through every `finally`, which ends the runs and the teacher.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    arguments_of_plan = {"seed": options.seed, "kills": options.kills, "kinds": options.kinds, "stacks": options.stacks}
    file = None
    if options.json:
        try:
            file = ResultFile(options.json, arguments_of_plan)
        except (ValueError, KeyError, TypeError, OSError) as error:
            sys.exit(f"fault_drill: error: --json: {error}")
        trials = [trial for trial in trials if trial.number not in file.done]
        print(f"{len(file.done)} kills are done already, {len(trials)} to do", flush=True)
    directory = Path(options.workdir) if options.workdir else Path(tempfile.mkdtemp(prefix="fault_drill_"))
    started = time.monotonic()
    with Campaign(directory, hang_limit_s=options.hang_limit_s, stop_s=options.stop_s) as campaign:
        results = campaign.run(batches(trials), options.jobs, file.add if file else lambda results: None)
        problems = campaign.problems
    if file is not None:
        results = file.results
    print(f"\n{table(results)}\n")
    failed = [result for result in results if result.problems]
    kills = sum(result.kind != FINISHED for result in results)
    print(
        f"{kills} kills in {(time.monotonic() - started) / 60:.1f} minutes, seed {options.seed}: {len(failed)} failed"
    )
    for problem in problems:
        print(problem)
    if failed or problems:
        print(f"logs and checkpoints: {directory}")
        return 1
    if not options.workdir:
        shutil.rmtree(directory)
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="number of kills (default: 100)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the choice of kinds, stacks, phases and moments (default: 0)"
    )
    parser.add_argument(
        "--kinds",
        type=lambda text: text.split(","),
        default=list(KINDS),
        help=f"comma-separated; default: all ({', '.join(KINDS)})",
    )
    parser.add_argument(
        "--stacks",
        type=lambda text: text.split(","),
        default=list(ALL_STACKS),
        help=f"comma-separated; default: all ({', '.join(ALL_STACKS)})",
    )
    parser.add_argument(
        "--workdir", metavar="DIR", help="directory of the runs; unset: a temporary directory, removed after success"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of concurrent runs (default: 1)")
    parser.add_argument(
        "--hang-limit-s", type=float, default=90.0, help="seconds in which a run must end after a kill (default: 90)"
    )
    parser.add_argument(
        "--stop-s", type=float, default=20.0, help="seconds for which a process is stopped (default: 20)"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="file of results; kills that it already has are skipped, so a drill can be resumed",
    )
    parser.add_argument("--list", action="store_true", help="print the planned kills and exit")
    options = parser.parse_args(argv)
    for flag, names, known in (("--kinds", options.kinds, KINDS), ("--stacks", options.stacks, ALL_STACKS)):
        unknown = [name for name in names if name not in known]
        if unknown:
            parser.error(f"{flag}: found {', '.join(unknown)}, expected some of {', '.join(known)}")
    if not on_stacks([KINDS[name] for name in options.kinds], options.stacks):
        parser.error("none of --kinds applies to any of --stacks")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
