"""Convert a torch_dist checkpoint to a Hugging Face directory, on the CPU.

    python tools/convert_torch_dist_to_hf.py --input-dir run/iter_0000100 --output-dir run_hf --origin-hf-dir Qwen3-8B

The checkpoint may have been saved at any parallel layout. Shards are written one at a time and read back; after a kill
the same command resumes with the first missing shard. Tokenizer and config come from --origin-hf-dir, and so do weights
that are not trained (multi-token prediction); the others keep their dtype. `sha256sum --check manifest.sha256` in
--output-dir checks every file.
"""

from __future__ import annotations

import argparse
import os
import sys

from slime_opd.checkpoint import manifest, whole
from slime_opd.checkpoint.location import Location
from slime_opd.errors import CheckpointError, SlimeOPDError


def main() -> int:
    """Convert --input-dir to --output-dir; returns the exit code."""
    options = parse_arguments()
    try:
        reused = convert(options)
    except SlimeOPDError as error:
        print(f"convert_torch_dist_to_hf: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.output_dir}" + (f" ({len(reused)} shards were complete already)" if reused else ""))
    return 0


def parse_arguments() -> argparse.Namespace:
    """The options of the command line, under slime's names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input-dir", required=True, help="checkpoint directory, or one iteration's directory in it")
    parser.add_argument("--output-dir", required=True, help="Hugging Face directory to write")
    parser.add_argument("--origin-hf-dir", required=True, help="Hugging Face directory of the same architecture")
    parser.add_argument("--chunk-size", type=int, default=5 * 1024**3, help="bytes per shard (default: 5 GiB)")
    parser.add_argument(
        "--no-verify-checkpoint", action="store_true", help="do not compare --input-dir with its checksums"
    )
    parser.add_argument("-f", "--force", action="store_true", help="write into a directory that is not empty")
    return parser.parse_args()


def convert(options: argparse.Namespace) -> list[str]:
    """Write the checkpoint's weights shard by shard; returns the shards that an earlier run had written."""
    # Weights are copied from file to file, which needs no GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from slime_opd.checkpoint import directory
    from slime_opd.checkpoint.formats import torch_dist_to_hf

    location = directory.require(options.input_dir, "--input-dir")
    if location.is_hugging_face:
        raise SlimeOPDError(
            f"--input-dir {options.input_dir} is a Hugging Face directory already; expected a torch_dist checkpoint"
        )
    origin = directory.find(options.origin_hf_dir)
    if origin is None or not origin.is_hugging_face:
        raise SlimeOPDError(
            f"--origin-hf-dir {options.origin_hf_dir}: no config.json there, expected a Hugging Face directory"
        )
    if not options.no_verify_checkpoint:
        verify(location)
    return torch_dist_to_hf.convert(
        location.directory,
        options.output_dir,
        options.origin_hf_dir,
        shard_bytes=options.chunk_size,
        overwrite=options.force,
    )


def verify(location: Location) -> None:
    """Raise CheckpointError where a file of the checkpoint is missing or differs from its checksum."""
    problems = whole.problems_of(location)
    if not problems and (entries := whole.expected_files(location)):
        problems = manifest.content_problems(location.directory, entries)
    if problems:
        raise CheckpointError(whole.refusal(location, "--input-dir", problems))


if __name__ == "__main__":
    sys.exit(main())
