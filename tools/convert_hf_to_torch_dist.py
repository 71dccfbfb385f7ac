"""Convert a Hugging Face checkpoint to Megatron's torch_dist format, on the CPU.

    source scripts/models/qwen3-8B.sh
    python tools/convert_hf_to_torch_dist.py "${MODEL_ARGS[@]}" --hf-checkpoint Qwen3-8B --save Qwen3-8B_torch_dist

Takes the flags of the training command, and --force to overwrite a checkpoint in --save. Without MODEL_ARGS the
architecture is read from --hf-checkpoint. The result can be loaded at any parallel layout. Weights keep their dtype
unless --bf16, --fp16 or --fp32 is given; fp8 becomes bf16.

Weights are read, written and read back one at a time, so memory use is that of one file, not of the model; with
torchrun the processes share the work. The tokenizer is copied beside the weights, and manifest.sha256 has the checksum
of every file.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from slime_opd.checkpoint.lock import LOCK
from slime_opd.config.config import Config
from slime_opd.config.parser import command_line, parse
from slime_opd.errors import CheckpointError, ConfigError


def main(argv: list[str]) -> None:
    """Convert --hf-checkpoint to a release in --save. Raises ConfigError or CheckpointError."""
    force = "--force" in argv
    config = parse([argument for argument in argv if argument != "--force"])
    hf_checkpoint, save = config.model.hf_checkpoint, config.checkpoint.save
    if hf_checkpoint is None:
        raise ConfigError("--hf-checkpoint is missing; give the directory to read")
    if save is None:
        raise ConfigError("--save is missing; give the directory to write")
    target = Path(save)
    left_behind = (".partial", LOCK)
    if target.is_dir() and any(p for p in target.iterdir() if not p.name.endswith(left_behind)) and not force:
        raise ConfigError(f"--save {target} is not empty; choose another directory or add --force")
    # Weights are copied from file to file, which needs no GPU.
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

    source = directory.require(hf_checkpoint, "--hf-checkpoint")
    config = with_defaults(config, weights_dtype(hf_checkpoint))
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


def with_defaults(config: Config, dtype: object) -> Config:
    """The configuration with defaults: the architecture of --hf-checkpoint, and the `dtype` of its weights."""
    if config.model.num_layers is None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, megatron_to_hf_mode="bridge"))
    training = config.training
    if not (training.bf16 or training.fp16 or training.fp32):
        flag = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}[str(dtype)]
        flags: dict[str, Any] = {flag: True}
        config = dataclasses.replace(config, training=dataclasses.replace(training, **flags))
    return config


def command(argv: list[str]) -> None:
    """`main` for the command line: reports a CheckpointError like a wrong flag."""
    try:
        main(argv)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    command_line(command)
