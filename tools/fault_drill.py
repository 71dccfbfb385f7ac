"""Kill every kind of process of real training runs, and check that nothing is left behind and nothing is lost.

    python tools/fault_drill.py --kills 100 --seed 0

Starts tiny runs on this machine's CPU (supervised fine-tuning on one and two ranks; GRPO with reward workers;
distillation from an SGLang teacher; two engines behind a router), kills one of their processes at a moment drawn from
the seed, and starts the same command again. After each kill: the run has ended in time, with the exit code and the
sentence it promises, or has survived; no process and no shared memory is left; the next start goes on after the last
checkpoint. A run of fine-tuning that was killed again and again ends with the same tensors, bit for bit, as one that
was not. Exit code 1 where anything else was seen. It needs no GPU and no network.
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


def main(arguments: list[str]) -> int:
    """Do the drill; returns the exit code."""
    options = parse_arguments(arguments)
    kinds = on_stacks([KINDS[name] for name in options.kinds], options.stacks)
    trials = plan(options.kills, options.seed, kinds)
    if options.list:
        for trial in trials:
            print(
                f"{trial.number}: {trial.kind.name} in {trial.phase.value!r} of {trial.stack}, after {trial.after} steps"
            )
        return 0
    from drill.campaign import Campaign

    # As Ctrl-C: by way of every `finally`, which ends the runs and the teacher.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    names = {"seed": options.seed, "kills": options.kills, "kinds": options.kinds, "stacks": options.stacks}
    kept = None
    if options.json:
        try:
            kept = ResultFile(options.json, names)
        except (ValueError, KeyError, TypeError, OSError) as error:
            sys.exit(f"fault_drill: error: --json: {error}")
        trials = [trial for trial in trials if trial.number not in kept.done]
        print(f"{len(kept.done)} kills are done already, {len(trials)} to do", flush=True)
    directory = Path(options.workdir) if options.workdir else Path(tempfile.mkdtemp(prefix="fault_drill_"))
    begun = time.monotonic()
    with Campaign(directory, hang_limit_s=options.hang_limit_s, stop_s=options.stop_s) as campaign:
        results = campaign.run(batches(trials), options.jobs, kept.add if kept else lambda results: None)
        problems = campaign.problems
    if kept is not None:
        results = kept.results
    print(f"\n{table(results)}\n")
    failed = [result for result in results if result.problems]
    kills = sum(result.kind != FINISHED for result in results)
    print(f"{kills} kills in {(time.monotonic() - begun) / 60:.1f} minutes, seed {options.seed}: {len(failed)} failed")
    for problem in problems:
        print(problem)
    if failed or problems:
        print(f"logs and checkpoints: {directory}")
        return 1
    if not options.workdir:
        shutil.rmtree(directory)
    return 0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills to do (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="draws kinds, stacks, phases and moments (default: 0)")
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
        "--workdir", metavar="DIR", help="where runs are kept; unset: a temporary directory, removed after success"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at one time (default: 1)")
    parser.add_argument("--hang-limit-s", type=float, default=90.0, help="seconds to end after a kill (default: 90)")
    parser.add_argument(
        "--stop-s", type=float, default=20.0, help="seconds that a process is stopped for (default: 20)"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="keep every kill's outcome, run by run; the kills that it holds are not done again, so a drill that was cut short goes on",
    )
    parser.add_argument("--list", action="store_true", help="print the kills that would be done, and do none")
    options = parser.parse_args(arguments)
    for flag, names, known in (("--kinds", options.kinds, KINDS), ("--stacks", options.stacks, ALL_STACKS)):
        unknown = [name for name in names if name not in known]
        if unknown:
            parser.error(f"{flag}: found {', '.join(unknown)}, expected some of {', '.join(known)}")
    if not on_stacks([KINDS[name] for name in options.kinds], options.stacks):
        parser.error("none of --kinds applies to any of --stacks")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
