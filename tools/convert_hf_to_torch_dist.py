"""Convert a Hugging Face checkpoint to Megatron's torch_dist format.

    source scripts/models/qwen3-8B.sh
    python tools/convert_hf_to_torch_dist.py "${MODEL_ARGS[@]}" --hf-checkpoint Qwen3-8B --save Qwen3-8B_torch_dist

Takes the flags of the training command. The layout it runs at (`--tensor-model-parallel-size`, …) does not matter to who
loads the result; use torchrun with several processes for a model that one process cannot hold. Without MODEL_ARGS the
architecture is read from --hf-checkpoint. Weights keep their dtype unless --bf16, --fp16 or --fp32 is given.
"""

from __future__ import annotations

import dataclasses

from slime_opd.config.config import Config
from slime_opd.config.parser import command_line, parse
from slime_opd.errors import ConfigError


def main(arguments: list[str]) -> None:
    """Read --hf-checkpoint, write --save."""
    config = parse(arguments)
    for flag, value in (("--hf-checkpoint", config.model.hf_checkpoint), ("--save", config.checkpoint.save)):
        if value is None:
            raise ConfigError(f"{flag} is missing; give the directory to {'read' if 'hf' in flag else 'write'}")
    import torch

    from slime_opd.megatron import checkpoint, hugging_face, parallel
    from slime_opd.megatron.model import build_model, make_bridge

    config = completed(config, hugging_face.weights_dtype(config.model.hf_checkpoint))
    with parallel.tool_process(config.parallel), torch.no_grad():
        bridge = make_bridge(config)
        model = build_model(config, bridge)
        location = checkpoint.require(config.model.hf_checkpoint, "--hf-checkpoint")
        checkpoint.load_weights(model, bridge, location, "--hf-checkpoint")
        path = checkpoint.save(config.checkpoint.save, None, model, None, {})
        if torch.distributed.get_rank() == 0:
            print(f"wrote {path}")


def completed(config: Config, dtype: object) -> Config:
    """The configuration with what was not said: the architecture's source, and the dtype of the weights."""
    if config.model.num_layers is None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, megatron_to_hf_mode="bridge"))
    training = config.training
    if not (training.bf16 or training.fp16 or training.fp32):
        flag = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}[str(dtype)]
        config = dataclasses.replace(config, training=dataclasses.replace(training, **{flag: True}))
    return config


if __name__ == "__main__":
    command_line(main)
