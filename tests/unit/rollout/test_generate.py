"""Generation: order, overlap, fields, failures and cancellation, against a scripted engine."""

import asyncio
import dataclasses

import numpy as np
import pytest
from rollout_fakes import EOS, FakeClient, FakeTeacher, FirstLetterReward, LetterTokenizer, config, generation, prompts

from slime_opd.errors import DataError, EngineError, TeacherMismatch
from slime_opd.rollout.generate import Generator
from slime_opd.types import RolloutBatch, Status


def generate(client, count=1, *, reward=None, teacher=None, length=2, on_sample=None, **rollout):
    async def run():
        generator = Generator(client, LetterTokenizer(), config(**rollout), reward=reward, teacher=teacher)
        return await generator.generate(prompts(count, length), on_sample)

    return asyncio.run(run())


def only_sample(*args, **kwargs):
    [group] = generate(*args, **kwargs)
    [sample] = group.samples
    return sample


def test_groups_and_samples_keep_the_order_of_the_requests_whatever_ends_first():
    async def later_first(number):
        for _ in range(20 - number):
            await asyncio.sleep(0)
        return generation([number + 1, EOS])

    finished = []
    groups = generate(FakeClient(later_first), 3, n_samples_per_prompt=2, on_sample=finished.append)
    assert [group.prompt.index for group in groups] == [0, 1, 2]
    assert [[sample.response for sample in group.samples] for group in groups] == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert [sample.response for sample in finished] == ["f", "e", "d", "c", "b", "a"]


def test_one_sample_per_prompt_is_a_group_of_one_and_no_prompts_are_no_groups():
    groups = generate(FakeClient(lambda _: generation([2])), 2)
    assert [len(group.samples) for group in groups] == [1, 1]
    assert generate(FakeClient(lambda _: generation([2])), 0) == []


def test_a_sample_carries_tokens_text_and_every_field_of_its_rollout():
    sample = only_sample(
        FakeClient(lambda _: generation([2, 3, EOS])), reward=FirstLetterReward(), teacher=FakeTeacher()
    )
    assert sample.tokens == (1, 2, 2, 3, EOS)
    assert (sample.response, sample.status) == ("bc", Status.COMPLETED)
    expected = {
        "loss_mask": [1, 1, 1],
        "rollout_log_probs": [-1, -2, -3],
        "truncated": [0],
        "group": [0],
        "reward": [1],
        "teacher_log_probs": [-0.5, -0.5, -0.5],
        "teacher_failed": [0],
    }
    assert {name: values.tolist() for name, values in sample.values.items()} == expected
    assert sample.values["rollout_log_probs"].dtype == np.float32


def test_without_reward_and_teacher_their_fields_are_absent():
    sample = only_sample(FakeClient(lambda _: generation([2])))
    assert set(sample.values) == {"loss_mask", "rollout_log_probs", "truncated", "group"}


def test_group_is_the_index_of_the_prompt_in_the_run():
    groups = generate(FakeClient(lambda _: generation([2])), 3, n_samples_per_prompt=2)
    samples = [sample for group in groups for sample in group.samples]
    assert RolloutBatch.from_samples(samples).columns["group"].tolist() == [0, 0, 1, 1, 2, 2]


def test_special_tokens_are_left_out_of_the_text_but_not_of_the_tokens():
    sample = only_sample(FakeClient(lambda _: generation([27, 2, EOS])))
    assert (sample.response, sample.response_tokens) == ("b", (27, 2, EOS))


def test_a_response_that_met_the_length_limit_is_truncated():
    sample = only_sample(FakeClient(lambda _: generation([2, 3], "length")))
    assert sample.status is Status.TRUNCATED
    assert sample.values["truncated"].tolist() == [1]


def test_an_empty_response_is_rewarded_and_carries_its_empty_scores():
    sample = only_sample(FakeClient(lambda _: generation([])), reward=FirstLetterReward(), teacher=FakeTeacher())
    assert sample.response_length == 0 and sample.response == ""
    assert sample.values["teacher_log_probs"].shape == sample.values["loss_mask"].shape == (0,)
    assert (sample.values["reward"].tolist(), sample.values["teacher_failed"].tolist()) == ([0], [0])


def test_a_failed_teacher_leaves_nan_and_a_mark_on_its_sample_alone():
    groups = generate(FakeClient(lambda _: generation([2, 3])), 2, teacher=FakeTeacher(fail={1}))
    good, failed = (group.samples[0].values for group in groups)
    assert good["teacher_failed"].tolist() == [0] and np.isfinite(good["teacher_log_probs"]).all()
    assert failed["teacher_failed"].tolist() == [1] and np.isnan(failed["teacher_log_probs"]).all()
    assert failed["teacher_log_probs"].shape == (2,)


def test_the_teacher_scores_a_response_while_others_are_still_generated():
    async def run():
        teacher = FakeTeacher()

        async def last_waits_for_the_teacher(number):
            if number == 1:
                await teacher.has_request.wait()
            return generation([2])

        generator = Generator(
            FakeClient(last_waits_for_the_teacher), LetterTokenizer(), config(), reward=None, teacher=teacher
        )
        return await asyncio.wait_for(generator.generate(prompts(2)), timeout=10)

    assert len(asyncio.run(run())) == 2  # it would time out if scoring waited for all generations


def test_reward_and_teacher_work_on_a_response_at_the_same_time():
    class WaitsForTheTeacher(FirstLetterReward):
        async def __call__(self, sample):
            await asyncio.wait_for(teacher.has_request.wait(), timeout=10)
            return 0.5

    class WaitsForTheReward(FakeTeacher):
        async def score(self, sample):
            scores = await super().score(sample)
            await asyncio.sleep(0)
            return scores

    teacher = WaitsForTheReward()
    sample = only_sample(FakeClient(lambda _: generation([2])), reward=WaitsForTheTeacher(), teacher=teacher)
    assert sample.reward == 0.5


@pytest.mark.parametrize("error", [EngineError("engine down"), DataError("bad")])
def test_an_error_cancels_the_requests_in_flight_and_is_raised_alone(error):
    async def fails_third(number):
        if number == 2:
            raise error
        await asyncio.Event().wait()

    client = FakeClient(fails_third)
    with pytest.raises(type(error)) as caught:
        generate(client, 5)
    assert caught.value is error
    assert client.cancelled == 4


def test_cancelled_requests_have_ended_before_the_error_is_raised():
    ended = []

    async def cleans_up(number):
        if number == 0:
            raise EngineError("engine down")
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            ended.append(number)

    async def run():
        generator = Generator(FakeClient(cleans_up), LetterTokenizer(), config(), reward=None, teacher=None)
        with pytest.raises(EngineError):
            await generator.generate(prompts(3))
        return list(ended)

    assert sorted(asyncio.run(run())) == [1, 2]


def test_a_teacher_that_raises_ends_the_rollout():
    class Mismatched(FakeTeacher):
        async def score(self, sample):
            raise TeacherMismatch("other vocabulary")

    with pytest.raises(TeacherMismatch, match="other vocabulary"):
        generate(FakeClient(lambda _: generation([2])), 2, teacher=Mismatched())


def test_a_reward_that_raises_ends_the_rollout_with_its_name_and_prompt():
    class Broken(FirstLetterReward):
        async def __call__(self, sample):
            raise ZeroDivisionError("by zero")

    with pytest.raises(DataError, match="reward first_letter failed on a response to prompt 0: ZeroDivisionError"):
        generate(FakeClient(lambda _: generation([2])), reward=Broken())


def test_cancelling_a_rollout_cancels_its_requests():
    async def run():
        client = FakeClient(lambda _: asyncio.Event().wait())
        generator = Generator(client, LetterTokenizer(), config(), reward=None, teacher=None)
        task = asyncio.ensure_future(generator.generate(prompts(3)))
        while len(client.requests) < 3:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return client.cancelled

    assert asyncio.run(run()) == 3


def test_wrong_log_prob_counts_and_unknown_endings_are_errors():
    short = dataclasses.replace(generation([2, 3]), log_probs=np.zeros(1, dtype=np.float32))
    with pytest.raises(DataError, match="a generated span has 2 tokens and 1 log_probs"):
        generate(FakeClient(lambda _: short))
    with pytest.raises(EngineError, match="prompt 0 with 'abort'"):
        generate(FakeClient(lambda _: generation([2], "abort")))
