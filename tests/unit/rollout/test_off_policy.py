"""Off-policy samples: which ones they are, their fields, and the student's response where the other model fails."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest
from rollout_fakes import EOS, FakeClient, FakeTeacher, LetterTokenizer, config, generation, prompts

from slime_opd.config.stages import DivergenceConfig, OPDConfig
from slime_opd.engine.top_k import TopK
from slime_opd.errors import EngineError
from slime_opd.rollout import off_policy
from slime_opd.rollout.generate import Generator
from slime_opd.types import RolloutBatch


def mixing(samples_per_prompt: int = 4, **divergence):
    """A run that takes a fourth of its responses from the data set."""
    options = {"opd_off_policy_fraction": 0.25, "opd_off_policy_source": "dataset", "opd_off_policy_key": "answer"}
    made = config(n_samples_per_prompt=samples_per_prompt, rollout_batch_size=2)
    return dataclasses.replace(
        made,
        opd=OPDConfig(use_opd=True, opd_type="sglang"),
        divergence=DivergenceConfig(
            opd_divergence="forward_kl",
            opd_log_prob_top_k=2,
            **{"opd_top_k_strategy": "only_tch"} | options | divergence,
        ),
    )


class ScoringClient(FakeClient):
    """Also scores, as a student's engine does."""

    async def score_top_k(self, tokens, prompt_length, k):
        length = len(tokens) - prompt_length
        return np.zeros(length, np.float32), TopK(np.full((length, k), 5, np.int32), np.zeros((length, k), np.float32))


def rollout(run, client=None, count=2, teacher=None):
    """The samples of one rollout whose data set answers every prompt with c d and an end."""
    given = [dataclasses.replace(prompt, response_tokens=(3, 4, EOS)) for prompt in prompts(count)]
    client = client or ScoringClient(lambda _: generation([2, EOS]))
    generator = Generator(client, LetterTokenizer(), run, reward=None, teacher=teacher or FakeTeacher())
    groups = asyncio.run(generator.generate(given))
    return [sample for group in groups for sample in group.samples]


def test_a_share_of_the_responses_comes_from_the_data_set():
    samples = rollout(mixing())
    assert ["off_policy" in sample.values for sample in samples] == [False, False, False, True] * 2
    written = samples[3]
    assert written.response_tokens == (3, 4, EOS) and written.response == "cd"
    assert written.values["off_policy"].tolist() == [1.0]
    # Nobody sampled it from the student, so it has no log-prob of the sampling.
    assert "rollout_log_probs" not in written.values
    batch = RolloutBatch.from_samples(samples)
    assert np.isnan(batch.select([3]).columns["rollout_log_probs"]).all()
    assert batch.columns["off_policy"].tolist() == [0, 0, 0, 1] * 2


def test_off_policy_samples_are_scored_by_the_teacher_too():
    teacher = FakeTeacher()
    samples = rollout(mixing(), teacher=teacher)
    assert len(teacher.requests) == len(samples)
    assert samples[3].values["teacher_log_probs"].tolist() == [-0.5] * 3


def test_whole_rollouts_can_be_the_unit():
    run = mixing(opd_off_policy_unit="rollouts", opd_off_policy_fraction=0.5)
    # Prompts 0 and 1 are the first rollout, 2 and 3 the second.
    samples = rollout(run, count=4)
    assert ["off_policy" in sample.values for sample in samples] == [False] * 8 + [True] * 8


def test_the_students_candidates_come_from_its_engine():
    samples = rollout(mixing(opd_top_k_strategy="only_stu"), client=WithTop(lambda _: generation([2, EOS])))
    assert samples[0].values["student_top_ids"].tolist() == [[2, 6], [2, 6]]
    assert samples[3].values["student_top_ids"].tolist() == [[5, 5]] * 3


class WithTop(ScoringClient):
    """Generates with its most likely tokens."""

    async def generate(self, input_ids, sampling, num_top_logprobs=0):
        made = await super().generate(input_ids, sampling)
        rows = [[[-0.5, 2, None], [-1.5, 6, None]][:num_top_logprobs] for _ in made.token_ids]
        return dataclasses.replace(made, top_rows=rows)


def test_a_long_answer_is_cut_at_the_students_limit():
    run = mixing()
    run = dataclasses.replace(run, rollout=dataclasses.replace(run.rollout, rollout_max_response_len=2))
    written = rollout(run)[3]
    assert written.response_tokens == (3, 4)
    assert written.values["truncated"].tolist() == [1.0]


async def fail(prompt, context):
    raise EngineError("the teacher is away")


def test_where_the_other_model_fails_the_student_responds_and_it_counts_as_a_failure_of_the_teacher(monkeypatch):
    monkeypatch.setattr(off_policy, "take_from_data_set", fail)
    teacher = FakeTeacher()
    samples = rollout(mixing(), teacher=teacher)
    assert [sample.values["teacher_failed"].tolist() for sample in samples] == [[0], [0], [0], [1]] * 2
    assert samples[3].response_tokens == (2, EOS) and "off_policy" not in samples[3].values
    assert np.isnan(samples[3].values["teacher_log_probs"]).all()


@pytest.mark.parametrize("divergence", [{"opd_off_policy_fraction": 0.0}])
def test_without_a_share_there_is_no_mix(divergence):
    assert all("off_policy" not in sample.values for sample in rollout(mixing(**divergence)))
