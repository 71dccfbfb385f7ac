"""Convert a Hugging Face checkpoint to Megatron's torch_dist format, on the CPU.

    source scripts/models/qwen3-8B.sh
    python tools/convert_hf_to_torch_dist.py "${MODEL_ARGS[@]}" --hf-checkpoint Qwen3-8B --save Qwen3-8B_torch_dist

Takes the flags of the training command, and --force to write over a checkpoint that --save holds. Weights are read, written and
read back one at a time, so memory is that of a file and not of the model; with torchrun the processes share the work. Parallel sizes
do not matter to who loads the result. The tokenizer is kept beside the weights, and manifest.sha256 has the checksum of every file. Without MODEL_ARGS the architecture is read from --hf-checkpoint. Weights keep their dtype
unless --bf16, --fp16 or --fp32 is given; fp8 becomes bf16.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from slime_opd.checkpoint.lock import LOCK
from slime_opd.config.config import Config
from slime_opd.config.parser import command_line, parse
from slime_opd.errors import CheckpointError, ConfigError


def main(arguments: list[str]) -> None:
    """Read --hf-checkpoint, write --save."""
    force = "--force" in arguments
    config = parse([word for word in arguments if word != "--force"])
    for flag, value in (("--hf-checkpoint", config.model.hf_checkpoint), ("--save", config.checkpoint.save)):
        if value is None:
            raise ConfigError(f"{flag} is missing; give the directory to {'read' if 'hf' in flag else 'write'}")
    target = Path(config.checkpoint.save)
    left_behind = (".partial", LOCK)
    if target.is_dir() and any(p for p in target.iterdir() if not p.name.endswith(left_behind)) and not force:
        raise ConfigError(f"--save {target} is not empty; choose another directory or add --force")
    # Weights are moved from file to file; a GPU would only be in the way.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    from slime_opd.checkpoint import directory, disk
    from slime_opd.checkpoint.formats import hf_to_torch_dist
    from slime_opd.checkpoint.formats.failures import writing
    from slime_opd.checkpoint.formats.hf_reader import weight_files, weights_dtype
    from slime_opd.checkpoint.formats.verification import Verification, on_first_rank, write_manifest
    from slime_opd.checkpoint.lock import RunLock
    from slime_opd.checkpoint.publish import publish
    from slime_opd.checkpoint.tokenizer import copy_tokenizer
    from slime_opd.config.stages import ParallelConfig
    from slime_opd.model import parallel

    source = directory.require(config.model.hf_checkpoint, "--hf-checkpoint")
    config = completed(config, weights_dtype(config.model.hf_checkpoint))
    partial = target / "release.partial"
    needed = sum(file.stat().st_size for file in weight_files(source.directory))

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        disk.check_free_space(target, "release", needed)

    with parallel.tool_process(ParallelConfig()), torch.no_grad(), ExitStack() as stack:
        if torch.distributed.get_rank() == 0:
            stack.enter_context(RunLock(target))
        Verification(enabled=not config.checkpoint.no_verify_checkpoint).require(source, "--hf-checkpoint")
        with writing(partial, needed):
            on_first_rank(begin)
            hf_to_torch_dist.convert(config, partial)
            on_first_rank(lambda: copy_tokenizer(source.directory, partial))
            write_manifest(partial)
            final = on_first_rank(lambda: publish(partial))
        if torch.distributed.get_rank() == 0:
            print(f"wrote {final}")


def completed(config: Config, dtype: object) -> Config:
    """The configuration with what was not said: the architecture's source, and the dtype of the weights."""
    if config.model.num_layers is None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, megatron_to_hf_mode="bridge"))
    training = config.training
    if not (training.bf16 or training.fp16 or training.fp32):
        flag = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}[str(dtype)]
        config = dataclasses.replace(config, training=dataclasses.replace(training, **{flag: True}))
    return config


def command(arguments: list[str]) -> None:
    """`main`, for the command line: a checkpoint that cannot be read or written is answered as a wrong flag is."""
    try:
        main(arguments)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    command_line(command)
