"""Convert a torch_dist checkpoint to a Hugging Face directory, on the CPU.

    python tools/convert_torch_dist_to_hf.py --input-dir run/iter_0000100 --output-dir run_hf --origin-hf-dir Qwen3-8B

The checkpoint may have been saved at any parallel layout. Tokenizer and config come from --origin-hf-dir; weights keep the
dtype they were saved in.
"""

from __future__ import annotations

import argparse
import sys

from slime_opd.config.config import Config
from slime_opd.config.stages import ModelConfig, TrainingConfig
from slime_opd.errors import SlimeOPDError


def main() -> int:
    """Read --input-dir, write --output-dir."""
    options = parse_arguments()
    try:
        convert(options)
    except SlimeOPDError as error:
        print(f"convert_torch_dist_to_hf: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.output_dir}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line, under slime's names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input-dir", required=True, help="checkpoint directory, or one iteration's directory in it")
    parser.add_argument("--output-dir", required=True, help="Hugging Face directory to write")
    parser.add_argument("--origin-hf-dir", required=True, help="Hugging Face directory of the same architecture")
    parser.add_argument("--chunk-size", type=int, default=5 * 1024**3, help="bytes per shard (default: 5 GiB)")
    parser.add_argument("-f", "--force", action="store_true", help="write into a directory that is not empty")
    return parser.parse_args()


def convert(options: argparse.Namespace) -> None:
    """Load the checkpoint into one unsplit model and write its weights."""
    import torch
    from megatron.core import dist_checkpointing

    from slime_opd.megatron import checkpoint, hugging_face, parallel
    from slime_opd.megatron.model import build_model, exported_weights, make_bridge

    location = checkpoint.require(options.input_dir, "--input-dir")
    if location.is_hugging_face:
        raise SlimeOPDError(f"--input-dir {options.input_dir} is a Hugging Face directory already")
    saved = dist_checkpointing.load_tensors_metadata(str(location.directory))
    dtype = next(tensor.dtype for name, tensor in saved.items() if "embedding" in name and "optimizer" not in name)
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    config = Config(
        model=ModelConfig(hf_checkpoint=options.origin_hf_dir, megatron_to_hf_mode="bridge"),
        training=TrainingConfig(**{precision: True}),
    )
    with parallel.tool_process(config.parallel), torch.no_grad():
        bridge = make_bridge(config)
        model = build_model(config, bridge)
        checkpoint.load_weights(model, bridge, location, "--input-dir")
        hugging_face.write(
            exported_weights(model, bridge),
            options.output_dir,
            options.origin_hf_dir,
            shard_bytes=options.chunk_size,
            overwrite=options.force,
        )


if __name__ == "__main__":
    sys.exit(main())
