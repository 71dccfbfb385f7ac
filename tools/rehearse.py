"""Rehearse one training step at full size on a machine without a GPU: memory by phase, kernels, and waits of the host.

    python tools/rehearse.py [--micro-batches 2] [--sequences 2] [--save] -- FLAGS OF THE RUN

The flags are the run's own; of --hf-checkpoint only config.json is read. Nothing is computed and nothing is loaded: torch's CPU
build is made to believe in a CUDA device whose tensors have no memory. What that does not cover is printed with the result.
"""

from __future__ import annotations

import argparse
import sys

from slime_opd.errors import SlimeOPDError
from slime_opd.rehearsal import pretend_cuda


def main() -> int:
    """Parse, pretend, take the step, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--micro-batches", type=int, default=2, help="micro-batches of each optimizer step (default: 2)"
    )
    parser.add_argument("--sequences", type=int, default=2, help="sequences that fill a micro-batch (default: 2)")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of each sequence (default: 256)")
    parser.add_argument("--rank", type=int, default=0, help="the rank that is rehearsed (default: 0)")
    parser.add_argument("--save", action="store_true", help="gather the optimizer's state as a save does, too")
    parser.add_argument("--holders", type=int, default=4, help="lines to name that hold memory at a phase's peak")
    parser.add_argument("run", nargs=argparse.REMAINDER, help="-- and the flags of the run")
    options = parser.parse_args()
    try:
        pretend_cuda.load()
        print(rehearse(options))
    except SlimeOPDError as error:
        print(f"rehearse: error: {error}", file=sys.stderr)
        return 2
    return 0


def rehearse(options: argparse.Namespace) -> str:
    """The report of one rehearsed step."""
    pretend_cuda.install()
    from slime_opd.rehearsal import step
    from slime_opd.rehearsal.batch import Load, rehearsed_config
    from slime_opd.rehearsal.report import text_of

    load = Load(options.micro_batches, options.sequences, options.prompt_tokens)
    config = rehearsed_config([word for word in options.run if word != "--"], load)
    found = step.rehearse(config, load, rank=options.rank, with_save=options.save)
    return text_of(found, config, load, holders=options.holders)


if __name__ == "__main__":
    sys.exit(main())
