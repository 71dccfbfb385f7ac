"""Options in Megatron-core's own words reach the model, the gradient buffers and the optimizer."""

from __future__ import annotations

import shlex

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.dist

FLAGS = (
    "--softmax-scale 0.25 --no-async-tensor-model-parallel-allreduce --recompute-modules core_attn --check-for-large-grads "
    "--no-check-for-nan-in-grad --adam-eps 1e-6 --no-decoupled-weight-decay --hysteresis 5"
)


def what_arrived(rank, world_size, init_method, model_dir, mode):
    from slime_opd.config import parse
    from slime_opd.megatron.trainer import Trainer

    words = ["--hf-checkpoint", model_dir, "--num-rollout", "1", "--rollout-batch-size", "1", *shlex.split(FLAGS)]
    config = parse([*words, "--loss-type", "sft_loss", *shlex.split(mode)])
    trainer = Trainer(config, rank=rank, world_size=world_size, init_method=init_method)
    model, buffers = trainer.model.config, trainer.wrapped.ddp_config
    optimizer = trainer.optimizer.config
    return {
        "softmax_scale": model.softmax_scale,
        "recompute_modules": model.recompute_modules,
        "async": model.async_tensor_model_parallel_allreduce,
        "check_for_large_grads": buffers.check_for_large_grads,
        "check_for_nan_in_grad": buffers.check_for_nan_in_grad,
        "adam_eps": optimizer.adam_eps,
        "decoupled_weight_decay": optimizer.decoupled_weight_decay,
        "hysteresis": optimizer.hysteresis,
        # What the run gives where the user says nothing.
        "distributed": buffers.use_distributed_optimizer,
    }


RAW = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
    "--kv-channels 32 --swiglu --normalization RMSNorm --qk-layernorm --disable-bias-linear --vocab-size 64 "
    "--untie-embeddings-and-output-weights --use-rotary-position-embeddings"
)


@pytest.mark.parametrize("mode", ["--megatron-to-hf-mode bridge", RAW])
def test_each_part_of_the_run_has_what_was_said(tiny_model_dir, tmp_path, mode):
    (found,) = run_ranks(what_arrived, 1, tmp_path, str(tiny_model_dir), mode)
    assert found == {
        "softmax_scale": 0.25,
        "recompute_modules": ["core_attn"],
        "async": False,
        "check_for_large_grads": True,
        "check_for_nan_in_grad": False,
        "adam_eps": 1e-6,
        "decoupled_weight_decay": False,
        "hysteresis": 5,
        "distributed": True,
    }
