"""Two optimizer steps of every kind of distillation at every parallel layout, on real models: losses, gradients and metrics.

A trainer with a Megatron teacher trains one objective after the other, at each layout in the same order, on packed samples of
unequal lengths in several micro-batches.

Tolerance: 1e-4 relative in float32, 1e-5 absolute for what is near 0. What is left is the order of float32 sums, which the
layouts change, and what it has become after the steps before.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import save_tiny_model
from ranks import run_ranks
from rollouts import train

pytestmark = pytest.mark.dist

LAYOUTS = {"one process": (1, 1, 1), "DP=2": (2, 1, 1), "TP=2": (2, 2, 1), "PP=2": (2, 1, 2)}
PROMPTS, PER_PROMPT = 4, 2
FULL = {"opd_divergence": "reverse_kl"}

OBJECTIVES: dict[str, tuple[dict, dict]] = {
    "penalty": ({}, {}),
    "penalty with discount, clamp and refresh": (
        {"opd_kl_discount": 0.9, "opd_kl_clamp": 1.0, "opd_refresh_student": True},
        {},
    ),
    "penalty with discount of the first policy": ({"opd_kl_discount": 0.5}, {}),
    "reverse KL": ({}, FULL),
    "JSD at another temperature, with penalty": (
        {"opd_kl_coef": 0.5},
        {"opd_divergence": "jsd", "opd_jsd_beta": 0.3, "opd_temperature": 0.7},
    ),
    "forward KL over the union": (
        {},
        {"opd_divergence": "forward_kl", "opd_log_prob_top_k": 4, "opd_top_k_strategy": "union"},
    ),
    "token rewards on the intersection": (
        {},
        {"opd_divergence": "token_reward_direct", "opd_log_prob_top_k": 4, "opd_top_k_strategy": "intersection"},
    ),
    "soft token weights": ({}, FULL | {"opd_token_weighting": "soft"}),
    "top token weights of a penalty": ({}, {"opd_token_weighting": "top", "opd_token_keep_fraction": 0.3}),
    "reward and pass-rate weights": (
        {"opd_kl_coef": 0.5},
        FULL | {"opd_reward_beta": 0.5, "opd_pass_rate_weights": (1.0, 1.0)},
    ),
    "schedule, ramp, hidden states on the host": (
        {"opd_teacher_hidden_on_host": True},
        {"opd_schedule": "forward_kl:0.4,jsd:0.6", "opd_coef_ramp": "0:0.2,1:1.2"},
    ),
}
TOP_K = {"opd_divergence": "reverse_kl", "opd_log_prob_top_k": 4, "opd_top_k_strategy": "union"}


def make_config(student: str, teacher: str | None, world: int, tensor: int, pipeline: int):
    from slime_opd.config import stages
    from slime_opd.config.config import Config

    return Config(
        cluster=stages.ClusterConfig(actor_num_gpus_per_node=world),
        model=stages.ModelConfig(hf_checkpoint=student, megatron_to_hf_mode="bridge"),
        parallel=stages.ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline),
        training=stages.TrainingConfig(
            global_batch_size=PROMPTS * PER_PROMPT // 2,
            use_dynamic_batch_size=True,
            max_tokens_per_gpu=30,
            log_probs_chunk_size=7,
        ),
        rollout=stages.RolloutConfig(rollout_batch_size=PROMPTS, n_samples_per_prompt=PER_PROMPT, num_rollout=10),
        algorithm=stages.AlgorithmConfig(entropy_coef=0.1),
        # Adam turns a gradient that is nearly 0, and so is rounding, into a whole step.
        optimizer=stages.OptimizerConfig(lr=1e-5),
        opd=stages.OPDConfig(use_opd=True, opd_type="megatron", opd_teacher_load=teacher),
        divergence=stages.DivergenceConfig(**FULL),
    )


def objective(config, opd: dict, divergence: dict):
    """The configuration with another objective."""
    from slime_opd.config import stages

    return dataclasses.replace(
        config, opd=dataclasses.replace(config.opd, **opd), divergence=stages.DivergenceConfig(**divergence)
    )


def make_samples(top_k: int = 0):
    """Samples of unequal lengths, one with an empty response, one that is not the student's; with a server's answers, if asked."""
    from slime_opd.types import Prompt, Sample, Status

    random = np.random.default_rng(0)
    samples = []
    for number in range(PROMPTS * PER_PROMPT):
        length = 0 if number == 3 else int(random.integers(2, 14))
        prompt = Prompt(number // PER_PROMPT, tuple(random.integers(2, 60, random.integers(3, 8)).tolist()), "")
        sample = Sample(prompt, tuple(random.integers(2, 60, length).tolist()), "", Status.COMPLETED)
        mask = np.ones(length)
        mask[1:2] = 0
        sample.set("loss_mask", mask)
        sample.set("group", prompt.index)
        sample.set("reward", float(number % 3 == 0))
        if number != 5:
            sample.set("rollout_log_probs", random.normal(-4, 1, length))
        else:
            sample.set("off_policy", 1.0)
        if top_k:
            order = np.argsort(random.random((length, 2, 60)), axis=2)[:, :, :top_k]
            sample.set("student_top_ids", order[:, 0])
            sample.set("teacher_top_ids", order[:, 1])
            for name in ("teacher_top_log_probs", "teacher_on_student_log_probs"):
                sample.set(name, -random.uniform(3, 6, (length, top_k)).astype(np.float16))
            sample.set("teacher_log_probs", np.full(length, np.nan) if number == 6 else random.normal(-4, 1, length))
        samples.append(sample)
    return samples


def train_all(rank, world_size, init_method, student, teacher, tensor, pipeline):
    """The metrics of every objective's last step, and the weights after all of them."""
    from slime_opd.trainer.snapshots import WeightSnapshots
    from slime_opd.trainer.trainer import Trainer

    config = make_config(student, teacher, world_size, tensor, pipeline)
    trainer = Trainer(config, rank=rank, world_size=world_size, init_method=init_method)
    found = {}
    for name, (opd, divergence) in OBJECTIVES.items():
        trainer.config = objective(config, opd, divergence)
        assert trainer.config.steps_per_rollout == 2
        found[name] = train(trainer, make_samples(), progress=0.5)
    trainer.config = objective(config, {"opd_type": "sglang", "opd_teacher_load": None}, TOP_K)
    trainer.snapshots = WeightSnapshots(trainer.model)
    found["a server's answers"] = train(trainer, make_samples(4))
    return found, {name: tensor.numpy() for name, tensor in trainer.exported_weights()}


@pytest.fixture(scope="module")
def outcomes(tiny_model_dir, tmp_path_factory):
    """Of every layout: the metrics of all ranks together, by objective, and the weights in the end."""
    from slime_opd.metrics import merge, values

    teacher, rendezvous = tmp_path_factory.mktemp("teacher"), tmp_path_factory.mktemp("rendezvous")
    save_tiny_model(teacher, seed=1)
    found = {}
    for layout, (world, tensor, pipeline) in LAYOUTS.items():
        ranks = run_ranks(train_all, world, rendezvous, str(tiny_model_dir), str(teacher), tensor, pipeline)
        metrics = {name: values(merge(rank[0][name] for rank in ranks)) for name in ranks[0][0]}
        found[layout] = metrics, ranks[0][1]
    return found


@pytest.mark.parametrize("layout", ["DP=2", "TP=2", "PP=2"])
@pytest.mark.parametrize("name", [*OBJECTIVES, "a server's answers"])
def test_every_metric_is_that_of_one_process(outcomes, layout, name):
    expected, got = outcomes["one process"][0][name], outcomes[layout][0][name]
    assert got.keys() == expected.keys()
    for metric, value in expected.items():
        # The one metric that jumps: which tokens reach 80 percent is read off a histogram.
        tolerance = {"rel": 1e-2} if metric == "opd/kl_top80_token_fraction" else {"rel": 1e-4, "abs": 1e-5}
        assert got[metric] == pytest.approx(value, nan_ok=False, **tolerance), metric


@pytest.mark.parametrize("layout", ["DP=2", "TP=2", "PP=2"])
def test_all_objectives_end_in_the_weights_of_one_process(outcomes, layout):
    for name, values in outcomes[layout][1].items():
        # Two dozen steps of at most the learning rate, 1e-5, each.
        np.testing.assert_allclose(values, outcomes["one process"][1][name], atol=1e-4, err_msg=name)


def test_the_objectives_are_as_different_as_they_should_be(outcomes):
    metrics = outcomes["one process"][0]
    assert metrics["reverse KL"]["train/divergence_loss"] > 0.1
    assert "train/divergence_loss" not in metrics["penalty"]
    assert metrics["reverse KL"]["opd/overlap_ratio"] < 0.9
    assert metrics["penalty with discount, clamp and refresh"]["opd/clamp_fraction"] > 0
    assert metrics["top token weights of a penalty"]["opd/penalty_weight_effective_share"] == pytest.approx(0.3, abs=0.1)
    assert metrics["soft token weights"]["opd/divergence_weight_effective_share"] < 1
    losses = [found["train/loss"] for found in metrics.values()]
    assert len({round(loss, 4) for loss in losses}) == len(losses)


def learn_from_itself(rank, world_size, init_method, model, divergences):
    """Metrics of a step for each divergence, where the teacher is the student."""
    from slime_opd.config import stages
    from slime_opd.trainer.trainer import Trainer
    from slime_opd.metrics import values

    config = dataclasses.replace(
        make_config(model, model, 1, 1, 1),
        algorithm=stages.AlgorithmConfig(),
        optimizer=stages.OptimizerConfig(lr=0.0),
    )
    config = dataclasses.replace(config, opd=dataclasses.replace(config.opd, opd_only_reward=True))
    trainer = Trainer(config, rank=rank, world_size=world_size, init_method=init_method)
    found = []
    for divergence in divergences:
        trainer.config = objective(config, {}, divergence)
        found.append(values(train(trainer, make_samples())))
    return found


def test_a_teacher_that_is_the_student_has_no_divergence_and_no_gradient(tiny_model_dir, tmp_path):
    divergences = [
        {"opd_divergence": kind, "opd_log_prob_top_k": top_k, "opd_top_k_strategy": "union"}
        for kind in ("reverse_kl", "forward_kl", "jsd")
        for top_k in (0, 4)
    ]
    found = run_ranks(learn_from_itself, 1, tmp_path, str(tiny_model_dir), divergences)[0]
    for divergence, metrics in zip(divergences, found, strict=True):
        assert abs(metrics["opd/divergence"]) < 1e-5, divergence
        assert metrics["train/grad_norm"] < 1e-5, divergence
        assert metrics["opd/overlap_ratio"] == 1.0 and abs(metrics["opd/entropy_gap"]) < 1e-5
