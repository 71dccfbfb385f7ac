"""Options in Megatron-core's own words reach the model, the gradient buffers and the optimizer."""

from __future__ import annotations

import os
import shlex

import pytest
from ranks import run_ranks
from rollouts import log_probs_of

pytestmark = pytest.mark.dist

FLAGS = (
    "--no-batch-p2p-sync --deterministic-mode --recompute-modules core_attn --pad-buckets-for-high-nccl-busbw --decoupled-lr 1e-3 "
    "--no-check-for-nan-in-grad --adam-eps 1e-6 --no-decoupled-weight-decay --hysteresis 5"
)


def what_arrived(rank, world_size, init_method, model_dir, mode):
    from slime_opd.config import parse
    from slime_opd.trainer.trainer import Trainer

    words = ["--hf-checkpoint", model_dir, "--num-rollout", "1", "--rollout-batch-size", "1", *shlex.split(FLAGS)]
    config = parse([*words, "--loss-type", "sft_loss", *shlex.split(mode)])
    trainer = Trainer(config, rank=rank, world_size=world_size, init_method=init_method)
    model, buffers = trainer.model.config, trainer.wrapped.ddp_config
    optimizer = trainer.optimizer.config
    return {
        "batch_p2p_sync": model.batch_p2p_sync,
        "deterministic_mode": model.deterministic_mode,
        "kernels that may differ": os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"],
        "recompute_modules": model.recompute_modules,
        "pad_buckets": buffers.pad_buckets_for_high_nccl_busbw,
        "check_for_nan_in_grad": buffers.check_for_nan_in_grad,
        "adam_eps": optimizer.adam_eps,
        "decoupled_weight_decay": optimizer.decoupled_weight_decay,
        "hysteresis": optimizer.hysteresis,
        "learning rates": sorted({group["max_lr"] for group in trainer.optimizer.param_groups}),
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
        "batch_p2p_sync": False,
        "deterministic_mode": True,
        "kernels that may differ": "0",
        "recompute_modules": ["core_attn"],
        "pad_buckets": True,
        "check_for_nan_in_grad": False,
        "adam_eps": 1e-6,
        "decoupled_weight_decay": False,
        "hysteresis": 5,
        # Of the embedding and the output layer, and of the rest.
        "learning rates": [1e-6, 1e-3],
        "distributed": True,
    }


def log_probs_of_three_layers(rank, world_size, init_method, model_dir):
    """This rank's layers, and the log-probs where it has the last."""
    import numpy as np

    from slime_opd.config import parse
    from slime_opd.trainer.trainer import Trainer
    from slime_opd.types import RolloutBatch, TrainBatch

    words = f"--hf-checkpoint {model_dir} --megatron-to-hf-mode bridge --num-rollout 1 --rollout-batch-size 1 --loss-type sft_loss"
    if world_size == 2:
        words += " --actor-num-gpus-per-node 2 --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1"
    trainer = Trainer(parse(words.split()), rank=rank, world_size=world_size, init_method=init_method)
    columns = {"loss_mask": np.ones(9, np.float32)}
    batch = TrainBatch(RolloutBatch(np.arange(3, 15), np.array([3]), np.array([9]), columns), ((1,),))
    log_probs = log_probs_of(trainer, batch)
    exported = {name: float(weight.double().sum()) for name, weight in trainer.exported_weights()}
    return len(trainer.model.decoder.layers), log_probs, exported


def test_a_stage_with_a_number_of_layers_of_its_own(tmp_path):
    from conftest import save_tiny_model

    save_tiny_model(tmp_path / "model", num_hidden_layers=3)
    (rendezvous := tmp_path / "rendezvous").mkdir()
    ((_, expected, weights),) = run_ranks(log_probs_of_three_layers, 1, rendezvous, str(tmp_path / "model"))
    first, second = run_ranks(log_probs_of_three_layers, 2, rendezvous, str(tmp_path / "model"))
    assert (first[0], second[0]) == (1, 2)
    assert second[1] == pytest.approx(expected, abs=1e-4)
    assert first[2] == second[2] == weights


def bias_in_bfloat16(rank, world_size, init_method, model_dir):
    import numpy as np
    import torch

    from slime_opd.config import parse
    from slime_opd.trainer.trainer import Trainer
    from slime_opd.types import RolloutBatch, TrainBatch

    words = f"--hf-checkpoint {model_dir} --megatron-to-hf-mode bridge --num-rollout 1 --rollout-batch-size 1 --loss-type sft_loss --bf16"
    trainer = Trainer(parse(words.split()), rank=rank, world_size=world_size, init_method=init_method)
    columns = {"loss_mask": np.ones(9, np.float32), "policy_weights": np.full(9, 1 / 9, np.float32)}
    batch = RolloutBatch(np.arange(3, 15), np.array([3]), np.array([9]), columns)
    trainer.score(TrainBatch(batch, ((1,),)), 0.0)
    trainer.step({}, 0.0)
    exported = dict(trainer.exported_weights())
    assert {weight.dtype for name, weight in exported.items() if "bias" not in name} == {torch.bfloat16}
    return {name: weight.numpy() for name, weight in exported.items() if "e_score_correction_bias" in name}


def test_the_bias_of_a_router_stays_float32_in_a_model_of_bfloat16(tmp_path):
    from model_families import save_model
    from safetensors.torch import load_file

    save_model(tmp_path / "model", "GLM-4.5")
    (rendezvous := tmp_path / "rendezvous").mkdir()
    (found,) = run_ranks(bias_in_bfloat16, 1, rendezvous, str(tmp_path / "model"))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert found
    for name, bias in found.items():
        assert bias.dtype == "float32" and (bias == weights[name].numpy()).all()
