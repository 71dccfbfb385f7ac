"""A run's rollouts as values: groups, metrics, timings, the weights' version and the prompt cursor."""

from __future__ import annotations

import dataclasses

import pytest
from rollout_fakes import EOS, FakeClient, FakeTeacher, LetterTokenizer, config, generation, prompts

from slime_opd.config.stages import OPDConfig, RewardConfig, TrainingConfig
from slime_opd.errors import TooManyFallbacks
from slime_opd.metrics import Mean, Replicated
from slime_opd.rollout.loop import BackgroundLoop
from slime_opd.rollout.manager import RolloutManager

BATCH = 2


class Source:
    """Prompts from a list, each with a response."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, count):
        taken = prompts(self._next + count)[self._next :]
        self._next += count
        return [dataclasses.replace(prompt, response_tokens=(3, EOS)) for prompt in taken]

    def state(self):
        return {"offset": self._next}


class Client(FakeClient):
    closed = False

    async def aclose(self):
        self.closed = True


class Session:
    """A teacher's session that notes its calls."""

    def __init__(self, teacher) -> None:
        self.teacher, self.calls = teacher, []

    def begin_rollout(self, step):
        self.calls.append(step)

    def end_rollout(self, samples):
        return {"perf/teacher_bytes_per_token": Mean(10.0 * len(samples), len(samples))}


def is_of_an_even_prompt(samples) -> bool:
    """A filter that rejects the groups of odd prompts."""
    return samples[0].prompt.index % 2 == 0


@pytest.fixture
def loop():
    with BackgroundLoop() as loop:
        yield loop


def manager(loop, *, client=None, teacher=None, run=None, **rollout) -> RolloutManager:
    run = run or config(rollout_batch_size=BATCH, **rollout)
    client = client or Client(lambda _: generation([2, EOS]))
    return RolloutManager(run, LetterTokenizer(), Source(), loop, client=client, teacher=teacher, eval_sets=[])


def test_a_rollout_carries_its_version_cursor_metrics_and_seconds(loop):
    session = Session(FakeTeacher())
    rollouts = manager(loop, teacher=session)
    first, second = (rollouts.generate(step, "rollout", weights_version=step + 3) for step in (0, 1))
    assert [group.prompt.index for group in first.groups + second.groups] == [0, 1, 2, 3]
    assert (first.weights_version, second.weights_version) == (3, 4)
    # The first rollout's values stay what they were when the second is generated before it is trained on.
    assert (first.prompt_cursor, second.prompt_cursor) == ({"offset": 2}, {"offset": 4})
    assert first.metrics == {"perf/teacher_bytes_per_token": Mean(20.0, 2)}
    assert first.timings.keys() == {"rollout"} and first.timings["rollout"] > 0
    assert session.calls == [0, 1]


def test_fine_tuning_takes_the_data_sets_responses_without_engines(loop):
    run = dataclasses.replace(config(rollout_batch_size=BATCH), training=TrainingConfig(loss_type="sft_loss"))
    source = Source()
    rollouts = RolloutManager(run, LetterTokenizer(), source, loop, client=None, teacher=None, eval_sets=[])
    rollout = rollouts.generate(0, "rollout", weights_version=0)
    rollouts.close()
    assert [sample.response_tokens for sample in rollout.samples] == [(3, EOS)] * BATCH
    assert [sample.values["loss_mask"].tolist() for sample in rollout.samples] == [[1, 1]] * BATCH
    assert (rollout.prompt_cursor, rollout.metrics) == ({"offset": 2}, {})


def test_dynamic_sampling_reports_the_groups_that_it_rejected(loop):
    rollouts = manager(loop, dynamic_sampling_filter_path="test_manager.is_of_an_even_prompt")
    rollout = rollouts.generate(0, "rollout", weights_version=1)
    assert [group.prompt.index for group in rollout.groups] == [0, 2]
    # Two of four prompts were rejected, the second of them perhaps after there were enough groups.
    assert rollout.metrics["rollout/groups_left_out"] in (Replicated(1), Replicated(2))
    assert rollout.prompt_cursor == {"offset": 4}


def test_more_responses_without_scores_than_the_limit_end_the_run_with_the_reason(loop):
    teacher = FakeTeacher(fail={1})
    teacher.latest_failure = "HTTP 500"
    run = dataclasses.replace(
        config(rollout_batch_size=BATCH),
        opd=OPDConfig(use_opd=True, opd_type="sglang", opd_max_fallback_fraction=0.25),
        reward=RewardConfig(rm_url="http://t:1"),
    )
    with pytest.raises(TooManyFallbacks, match=r"did not score 1 of 2 responses .*one reason: HTTP 500"):
        manager(loop, teacher=Session(teacher), run=run).generate(0, "rollout", weights_version=1)


def test_closing_closes_the_engines_client(loop):
    client = Client(lambda _: generation([2]))
    manager(loop, client=client).close()
    assert client.closed
