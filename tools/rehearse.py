"""Rehearse a full-size training step without a GPU: reports memory by phase, kernels, and host-device synchronisations.

    python tools/rehearse.py [--micro-batches 2] [--sequences 2] [--save] -- FLAGS OF THE RUN

The flags are those of the run; from --hf-checkpoint only config.json is read. No tensor is computed and no weights are
loaded: torch's CPU build gets a simulated CUDA device whose tensors have no memory. The report lists what this does not
cover.
"""

from __future__ import annotations

import argparse
import sys

from slime_opd.errors import SlimeOPDError
from slime_opd.rehearsal import simulated_cuda


def main() -> int:
    """Parse the command line, run the step on the simulated device, print the report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", type=int, default=2, help="micro-batches per optimizer step (default: 2)")
    parser.add_argument("--sequences", type=int, default=2, help="sequences per micro-batch (default: 2)")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="prompt tokens per sequence (default: 256)")
    parser.add_argument("--rank", type=int, default=0, help="the rank to rehearse (default: 0)")
    parser.add_argument("--save", action="store_true", help="also gather the optimizer's state, as a save does")
    parser.add_argument(
        "--holders",
        type=int,
        default=4,
        help="number of code lines to list that hold memory at a phase's peak (default: 4)",
    )
    parser.add_argument("run", nargs=argparse.REMAINDER, help="-- followed by the flags of the run")
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
    result = step.rehearse(config, load, rank=options.rank, with_save=options.save)
    return format_report(result, config, load, holders=options.holders)


if __name__ == "__main__":
    sys.exit(main())
