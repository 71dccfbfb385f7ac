"""A Megatron teacher whose vocabulary has more rows than the student's, or fewer: compared on the ids that both have.

Tolerance: float32 against Hugging Face's logits in float32, 1e-4 relative.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import save_tiny_model
from ranks import run_ranks
from rollouts import train

pytestmark = pytest.mark.dist

STUDENT_IDS = 64
PROMPT, RESPONSE = 4, 12


def make_config(student: str, teacher: str, tensor: int, opd_divergence: str | None = "reverse_kl", **divergence):
    from slime_opd.config import stages
    from slime_opd.config.config import Config

    return Config(
        cluster=stages.ClusterConfig(actor_num_gpus_per_node=tensor),
        model=stages.ModelConfig(hf_checkpoint=student, megatron_to_hf_mode="bridge"),
        parallel=stages.ParallelConfig(tensor_model_parallel_size=tensor),
        training=stages.TrainingConfig(global_batch_size=1, micro_batch_size=1, log_probs_chunk_size=5),
        rollout=stages.RolloutConfig(rollout_batch_size=1, num_rollout=1),
        opd=stages.OPDConfig(use_opd=True, opd_type="megatron", opd_teacher_load=teacher, opd_kl_coef=1.0),
        divergence=stages.DivergenceConfig(opd_divergence=opd_divergence, **divergence),
    )


def tokens() -> np.ndarray:
    """Ids that every vocabulary has, but for the last one, which may be the student's alone."""
    random = np.random.default_rng(0)
    return np.concatenate([random.integers(2, 50, PROMPT + RESPONSE - 1), [63]])


def take_step(rank, world_size, init_method, student, teacher, divergence):
    """The metrics of one step."""
    from slime_opd.trainer.trainer import Trainer
    from slime_opd.metrics import values
    from slime_opd.types import Prompt, Sample, Status

    config = make_config(student, teacher, world_size, **divergence)
    ids = tokens()
    sample = Sample(Prompt(0, tuple(ids[:PROMPT]), ""), tuple(ids[PROMPT:]), "", Status.COMPLETED)
    sample.set("loss_mask", np.ones(RESPONSE))
    sample.set("group", 0)
    trainer = Trainer(config, rank=rank, world_size=world_size, init_method=init_method)
    return values(train(trainer, [sample]))


def expected(student: Path, teacher: Path, shared: int) -> dict[str, float]:
    """From Hugging Face's logits, both models over the ids below `shared`."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(tokens())
    found = []
    for directory in (student, teacher):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        known = torch.where(ids < model.config.vocab_size, ids, 0)
        with torch.no_grad():
            logits = model(known[None]).logits[0, PROMPT - 1 : -1].double()
        found.append(logits[:, :shared].log_softmax(-1))
    log_p, log_q = found
    targets = ids[PROMPT:]
    ratio = (log_p - log_q).gather(1, targets.clamp(max=shared - 1)[:, None])[targets < shared]
    return {
        "opd/reverse_kl": ratio.mean().item(),
        "opd/distribution_reverse_kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "opd/distribution_forward_kl": (log_q.exp() * (log_q - log_p)).sum(-1).mean().item(),
    }


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("rows", [50, 80])
def test_a_teacher_of_another_vocabulary_is_compared_on_the_ids_that_both_have(
    tiny_model_dir, tmp_path, rows, world_size
):
    teacher = tmp_path / "teacher"
    save_tiny_model(teacher, seed=1, vocab_size=rows)
    rendezvous = tmp_path / "rendezvous"
    rendezvous.mkdir()
    wanted = expected(tiny_model_dir, teacher, min(rows, STUDENT_IDS))
    for options in ({}, {"opd_divergence": None}):
        found = run_ranks(take_step, world_size, rendezvous, str(tiny_model_dir), str(teacher), options)[0]
        for name in wanted if not options else ["opd/reverse_kl"]:
            assert found[name] == pytest.approx(wanted[name], rel=1e-4), (name, options)
        assert np.isfinite(found["train/grad_norm"])


def test_a_teacher_that_was_saved_with_other_padding_is_the_same_teacher(tiny_model_dir, tmp_path):
    teacher, megatron = tmp_path / "teacher", tmp_path / "megatron"
    save_tiny_model(teacher, seed=1)
    rendezvous = tmp_path / "rendezvous"
    rendezvous.mkdir()
    run_ranks(convert, 2, rendezvous, str(teacher), str(megatron))
    found = run_ranks(take_step, 1, rendezvous, str(tiny_model_dir), str(megatron), {"opd_log_prob_top_k": 64})[0]
    for name, value in expected(tiny_model_dir, teacher, STUDENT_IDS).items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


def convert(rank, world_size, init_method, source, target) -> None:
    """Save `source` as a Megatron checkpoint whose vocabulary is padded to a multiple of 224."""
    import dataclasses

    from slime_opd.checkpoint.formats.save import save
    from slime_opd.trainer.trainer import Trainer

    config = make_config(source, source, world_size)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, make_vocab_size_divisible_by=112))
    trainer = Trainer(config, rank=rank, world_size=world_size, init_method=init_method)
    save(target, None, trainer.model, None, {})
