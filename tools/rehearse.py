"""Rehearse one training step at full size on a machine without a GPU: memory by phase, kernels, and waits of the host.

    python tools/rehearse.py [--micro-batches 2] [--sequences 2] [--save] -- FLAGS OF THE RUN

The flags are those of the run; of --hf-checkpoint only config.json is read. Nothing is loaded or computed: a CUDA device whose tensors
have no memory is simulated in torch's CPU build. The report lists what this does not cover.
"""

from __future__ import annotations

import argparse
import sys

from slime_opd.errors import SlimeOPDError
from slime_opd.rehearsal import simulated_cuda


def main() -> int:
    """Print the report of a rehearsed step; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--micro-batches", type=int, default=2, help="micro-batches of each optimizer step (default: 2)"
    )
    parser.add_argument("--sequences", type=int, default=2, help="sequences that fill a micro-batch (default: 2)")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="prompt tokens of each sequence (default: 256)")
    parser.add_argument("--rank", type=int, default=0, help="rank to rehearse (default: 0)")
    parser.add_argument("--save", action="store_true", help="also gather the optimizer's state, as a save does")
    parser.add_argument(
        "--holders",
        type=int,
        default=4,
        help="number of lines of code to list that hold memory at a phase's peak (default: 4)",
    )
    parser.add_argument("run", nargs=argparse.REMAINDER, help="--, then the flags of the run")
    options = parser.parse_args()
    try:
        simulated_cuda.load()
        print(rehearse(options))
    except SlimeOPDError as error:
        print(f"rehearse: error: {error}", file=sys.stderr)
        return 2
    return 0


def rehearse(options: argparse.Namespace) -> str:
    """The report of one rehearsed step."""
    simulated_cuda.install()
    from slime_opd.rehearsal import step
    from slime_opd.rehearsal.batch import Load, rehearsed_config
    from slime_opd.rehearsal.report import format_report

    load = Load(options.micro_batches, options.sequences, options.prompt_tokens)
    config = rehearsed_config([argument for argument in options.run if argument != "--"], load)
    rehearsed = step.rehearse(config, load, rank=options.rank, with_save=options.save)
    return format_report(rehearsed, config, load, holders=options.holders)


if __name__ == "__main__":
    sys.exit(main())
