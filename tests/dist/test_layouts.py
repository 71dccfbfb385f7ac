"""One training step is the same step at every parallel layout: real processes on gloo, packed sequences of unequal lengths.

Tolerances: float32. Log-probs are compared with Hugging Face's at 1e-4 absolute; loss and gradient norm across layouts at
1e-4 relative. What is left is the order of float32 sums, which the layouts change.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from rollouts import log_probs_of, train_assembled

pytestmark = pytest.mark.dist

LAYOUTS = {"one process": (1, 1, 1), "DP=2": (2, 1, 1), "TP=2": (2, 2, 1), "PP=2": (2, 1, 2)}
SAMPLES = 8


def make_config(model_dir: str, world_size: int, tensor: int, pipeline: int, **options):
    from slime_opd.config import stages
    from slime_opd.config.config import Config

    return Config(
        cluster=stages.ClusterConfig(actor_num_gpus_per_node=world_size),
        model=stages.ModelConfig(hf_checkpoint=model_dir, megatron_to_hf_mode="bridge"),
        parallel=stages.ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline),
        training=stages.TrainingConfig(
            global_batch_size=SAMPLES, use_dynamic_batch_size=True, max_tokens_per_gpu=40, log_probs_chunk_size=7
        ),
        rollout=stages.RolloutConfig(rollout_batch_size=SAMPLES, num_rollout=10),
        algorithm=stages.AlgorithmConfig(entropy_coef=0.1),
        optimizer=stages.OptimizerConfig(lr=1e-3),
        opd=stages.OPDConfig(use_opd=True, **options),
    )


def make_batch(teacher_log_probs: np.ndarray | None = None):
    """Eight samples of unequal lengths, one of them with an empty response."""
    import torch

    from slime_opd.algorithm.reduction import token_weights
    from slime_opd.types import RolloutBatch

    random = np.random.default_rng(0)
    prompts, responses = random.integers(3, 8, SAMPLES), random.integers(1, 14, SAMPLES)
    responses[3] = 0
    total = int(responses.sum())
    mask = np.ones(total, dtype=np.float32)
    mask[::7] = 0
    teacher = random.normal(-4, 1, total).astype(np.float32) if teacher_log_probs is None else teacher_log_probs
    weights = token_weights(torch.from_numpy(mask), torch.from_numpy(responses), per_token=False).numpy()
    columns = {"loss_mask": mask, "teacher_log_probs": teacher, "policy_weights": weights}
    columns["advantages"] = random.normal(size=total).astype(np.float32)
    return RolloutBatch(random.integers(0, 60, int((prompts + responses).sum())), prompts, responses, columns)


def train_steps(rank, world_size, init_method, model_dir, tensor, pipeline, save_dir=None, load_dir=None):
    """Two optimizer steps; returns what a rank can say of them."""
    import dataclasses

    from slime_opd.trainer.trainer import Trainer
    from slime_opd.metrics import values
    from slime_opd.types import TrainBatch

    config = make_config(model_dir, world_size, tensor, pipeline, opd_type="sglang")
    config = dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, save=save_dir, load=load_dir)
    )
    trainer = Trainer(config, rank=rank, world_size=world_size, init_method=init_method)
    batch = make_batch()
    everything = TrainBatch(batch, ((SAMPLES,),))
    scores = log_probs_of(trainer, everything)
    first = values(train_assembled(trainer, batch))
    first_weights = {name: tensor.clone().numpy() for name, tensor in trainer.exported_weights()}
    if save_dir is not None:
        trainer.save(1, {"step": 1})
    second = values(train_assembled(trainer, batch))
    weights = {name: tensor.clone().numpy() for name, tensor in trainer.exported_weights()}
    return {
        "non-finite": non_finite_steps(trainer, batch, config),
        "scores": scores,
        "steps": [first, second],
        "first_weights": first_weights,
        "weights": weights,
        "run_state": trainer.start_report.run_state,
    }


def non_finite_steps(trainer, batch, config) -> dict:
    """Steps with a NaN and with a gradient too large for float32 in one sample, then a good one, then NaN until it is refused."""
    import torch

    from slime_opd.errors import NonFiniteError
    from slime_opd.metrics import values

    def with_advantage(value: float):
        advantages = batch.columns["advantages"].copy()
        advantages[int(batch.response_lengths[:5].sum()) + 1] = value
        spoiled = batch.with_column("advantages", advantages).with_column("group", np.arange(SAMPLES))
        return spoiled

    def state() -> list[torch.Tensor]:
        optimizers = [one.optimizer for one in trainer.optimizer.chained_optimizers]
        tensors = [tensor for one in optimizers for values_of in one.state.values() for tensor in values_of.values()]
        tensors += [parameter.data for parameter in trainer.model.parameters()]
        tensors += [p.data for one in optimizers for group in one.param_groups for p in group["params"]]
        return [tensor.clone() for tensor in [*tensors, torch.tensor(trainer.scheduler.num_steps)]]

    found: dict = {}
    before = state()
    for name, value in (("nan", np.nan), ("huge", 1e30)):
        found[name] = values(train_assembled(trainer, with_advantage(value)))
        found[f"{name} changed"] = [i for i, (old, new) in enumerate(zip(before, state(), strict=True)) if not old.equal(new)]
    found["good"] = values(train_assembled(trainer, with_advantage(1.0)))
    found["good changed"] = any(not old.equal(new) for old, new in zip(before, state(), strict=True))
    try:
        for _ in range(config.training.max_skipped_steps + 1):
            found["skipped before the end"] = trainer.skipped.in_a_row
            train_assembled(trainer, with_advantage(np.nan))
    except NonFiniteError as error:
        found["refusal"] = str(error)
    return found


@pytest.fixture(scope="module")
def outcomes(tiny_model_dir, tmp_path_factory) -> dict[str, list[dict]]:
    """Every layout's outcome, by rank; the run at TP=2 also saves a checkpoint after its first step."""
    directory = tmp_path_factory.mktemp("layouts")
    saved = {"TP=2": str(directory / "checkpoint")}
    rendezvous = tmp_path_factory.mktemp("rendezvous")
    return {
        name: run_ranks(train_steps, world, rendezvous, str(tiny_model_dir), tensor, pipeline, saved.get(name), None)
        for name, (world, tensor, pipeline) in LAYOUTS.items()
    } | {"checkpoint": saved["TP=2"]}


def reported(ranks: list[dict], step: int, metric: str) -> float:
    """A metric of a step: losses add up over the data-parallel ranks that report, norms are the same on each."""
    found = [rank["steps"][step][metric] for rank in ranks if metric in rank["steps"][step]]
    return sum(found) if metric == "train/loss" else found[0]


@pytest.mark.parametrize("layout", ["DP=2", "TP=2", "PP=2"])
@pytest.mark.parametrize("metric", ["train/loss", "train/grad_norm"])
def test_two_steps_have_the_loss_and_gradient_norm_of_one_process(outcomes, layout, metric):
    for step in (0, 1):
        expected = reported(outcomes["one process"], step, metric)
        assert reported(outcomes[layout], step, metric) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("layout", ["DP=2", "TP=2", "PP=2"])
def test_two_steps_end_in_the_weights_of_one_process(outcomes, layout):
    expected = outcomes["one process"][0]["weights"]
    assert outcomes[layout][0]["weights"].keys() == expected.keys()
    for name, values in outcomes[layout][0]["weights"].items():
        # Adam divides by the gradient's size, so a gradient near zero turns rounding into up to one learning rate (1e-3).
        np.testing.assert_allclose(values, expected[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_nan_in_one_sample_skips_the_step_on_every_rank_and_the_next_step_trains(outcomes, layout):
    for rank in outcomes[layout]:
        found = rank["non-finite"]
        assert found["nan changed"] == found["huge changed"] == [], "weights, optimizer or schedule moved in a skipped step"
        assert found["good changed"]
        # The rows of one run: a NaN, a gradient past float32, a good step, and then one more NaN than is tolerated.
        assert found["skipped before the end"] == 3
        assert "--max-skipped-steps 3" in found["refusal"] and "4 optimizer steps in a row" in found["refusal"]
        assert "prompt 5: advantages is nan at response token 1" in found["refusal"]
        if found["nan"]:  # a rank that reports
            counted = ["train/skipped_steps", "train/skipped_steps/loss", "train/skipped_steps/gradient"]
            assert [found["nan"][name] for name in counted] == [1, 1, 0] and "train/grad_norm" not in found["nan"]
            assert [found["huge"][name] for name in counted] == [1, 0, 1]
            assert [found["good"][name] for name in counted] == [0, 0, 0] and found["good"]["train/grad_norm"] > 0
            assert [found[name]["train/skipped_in_a_row"] for name in ("nan", "huge", "good")] == [1, 2, 0]


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_log_probs_are_hugging_faces(outcomes, layout, tiny_model_dir):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    batch = make_batch()
    expected, start = [], 0
    for prompt, response in zip(batch.prompt_lengths, batch.response_lengths, strict=True):
        tokens = torch.from_numpy(batch.tokens[start : start + prompt + response])
        start += prompt + response
        with torch.no_grad():
            log_probs = torch.log_softmax(model(tokens[None]).logits[0], dim=-1)
        expected.append(log_probs[:-1].gather(1, tokens[1:, None])[prompt - 1 :, 0])
    scores = next(rank["scores"] for rank in outcomes[layout] if rank["scores"] is not None)
    np.testing.assert_allclose(scores, torch.cat(expected).numpy(), atol=1e-4)


@pytest.mark.parametrize("layout", ["one process", "TP=2", "PP=2"])
def test_a_resumed_step_is_the_step_that_was_interrupted_at_any_layout(
    outcomes, layout, tiny_model_dir, tmp_path_factory
):
    world, tensor, pipeline = LAYOUTS[layout]
    ranks = run_ranks(
        train_steps,
        world,
        tmp_path_factory.mktemp("resume"),
        str(tiny_model_dir),
        tensor,
        pipeline,
        None,
        outcomes["checkpoint"],
    )
    assert ranks[0]["run_state"] == {"step": 1}
    for metric in ("train/loss", "train/grad_norm"):
        expected = reported(outcomes["one process"], 1, metric)
        assert reported(ranks, 0, metric) == pytest.approx(expected, rel=1e-4)
    # The resumed run takes one step more than was saved, as the first step of `train_steps`; its weights then are in "first".
    for name, values in ranks[0]["first_weights"].items():
        np.testing.assert_allclose(values, outcomes["one process"][0]["weights"][name], atol=1e-4, err_msg=name)


def self_teacher_step(rank, world_size, init_method, model_dir):
    """One step whose teacher is the student, loaded in the trainer."""
    from slime_opd.trainer.trainer import Trainer
    from slime_opd.metrics import values

    config = make_config(model_dir, world_size, 1, 1, opd_type="megatron", opd_teacher_load=model_dir)
    config = type(config)(
        **{
            **{name: getattr(config, name) for name in config.__dataclass_fields__},
            "algorithm": type(config.algorithm)(),
        }
    )
    trainer = Trainer(config, rank=rank, world_size=world_size, init_method=init_method)
    batch = make_batch().with_column("advantages", np.zeros(int(make_batch().response_lengths.sum())))
    return values(train_assembled(trainer, batch)), trainer.start_report.warnings


def test_a_teacher_that_is_the_student_has_no_reverse_kl_and_no_gradient(tiny_model_dir, tmp_path):
    metrics, warnings = run_ranks(self_teacher_step, 1, tmp_path, str(tiny_model_dir))[0]
    assert abs(metrics["opd/reverse_kl"]) < 1e-5
    assert metrics["train/grad_norm"] < 1e-5
    assert "identical" in warnings[0]


def refused_teacher(rank, world_size, init_method, student_dir, teacher_dir):
    """The sentence with which a teacher of another architecture is refused."""
    from slime_opd.errors import CheckpointError
    from slime_opd.trainer.trainer import Trainer

    config = make_config(student_dir, world_size, 1, 1, opd_type="megatron", opd_teacher_load=teacher_dir)
    with pytest.raises(CheckpointError) as refusal:
        Trainer(config, rank=rank, world_size=world_size, init_method=init_method)
    return str(refusal.value)


def test_a_teacher_of_another_architecture_is_refused_with_both_shapes(tiny_model_dir, tmp_path):
    import json
    import shutil

    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_model_dir, teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    (rendezvous := Path(tmp_path / "rendezvous")).mkdir()
    message = run_ranks(refused_teacher, 1, rendezvous, str(tiny_model_dir), str(teacher))[0]
    assert "--opd-teacher-load" in message and "96" in message and "128" in message


def raw_scores(rank, world_size, init_method, model_dir):
    """The scores of a model built from Megatron's flags, from weights that the conversion tool wrote."""
    import dataclasses

    from slime_opd.config import stages
    from slime_opd.trainer.trainer import Trainer
    from slime_opd.types import TrainBatch

    directory, torch_dist = model_dir
    config = dataclasses.replace(
        make_config(directory, world_size, 1, 1, opd_type="sglang"),
        checkpoint=stages.CheckpointConfig(ref_load=torch_dist),
        model=stages.ModelConfig(
            hf_checkpoint=directory,
            megatron_to_hf_mode="raw",
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            group_query_attention=True,
            num_query_groups=2,
            kv_channels=32,
            swiglu=True,
            normalization="RMSNorm",
            norm_epsilon=1e-6,
            qk_layernorm=True,
            disable_bias_linear=True,
            untie_embeddings_and_output_weights=True,
            use_rotary_position_embeddings=True,
            rotary_base=10000,
            vocab_size=64,
        ),
    )
    trainer = Trainer(config, rank=rank, world_size=world_size, init_method=init_method)
    return log_probs_of(trainer, TrainBatch(make_batch(), ((SAMPLES,),)))


def test_tools_round_trip_bit_for_bit_and_flags_build_the_model_of_the_config(outcomes, tiny_model_dir, tmp_path):
    import subprocess
    import sys

    from safetensors.torch import load_file

    tools = Path(__file__).parents[2] / "tools"
    torch_dist, back, rendezvous = tmp_path / "torch_dist", tmp_path / "back", tmp_path / "rendezvous"
    rendezvous.mkdir()
    for words in (
        ["convert_hf_to_torch_dist.py", "--hf-checkpoint", tiny_model_dir, "--save", torch_dist],
        [
            "convert_torch_dist_to_hf.py",
            "--input-dir",
            torch_dist,
            "--output-dir",
            back,
            "--origin-hf-dir",
            tiny_model_dir,
        ],
    ):
        subprocess.run([sys.executable, str(tools / words[0]), *map(str, words[1:])], check=True, timeout=120)
    before, after = load_file(tiny_model_dir / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    (scores,) = run_ranks(raw_scores, 1, rendezvous, (str(tiny_model_dir), str(torch_dist)))
    np.testing.assert_array_equal(scores, outcomes["one process"][0]["scores"])
