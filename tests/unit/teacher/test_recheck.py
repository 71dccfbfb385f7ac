"""During a run: a teacher that stays the same passes, one that changes stops the run, one that fails is counted."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future

import httpx
import numpy as np
import pytest
from scripted_teacher import ScriptedTeacher, each, shifted

from slime_opd.engine.client import EngineClient
from slime_opd.errors import TeacherError
from slime_opd.teacher.fingerprint import Fingerprint, distance, take_fingerprint
from slime_opd.teacher.recheck import TeacherRecheck
from slime_opd.teacher.sglang import SGLangTeacher

IDS = range(2, 90)


def client_of(server) -> EngineClient:
    return EngineClient("http://t:1", concurrency=4, timeout_s=5, retries=0, transport=httpx.MockTransport(server))


def teacher_of(server) -> SGLangTeacher:
    return SGLangTeacher(client_of(server))


def fingerprint_of(server) -> Fingerprint:
    return asyncio.run(take_fingerprint(client_of(server), IDS, None))


def at_once(coroutine) -> Future[None]:
    """A loop that has run the coroutine when `submit` returns."""
    future: Future[None] = Future()
    try:
        future.set_result(asyncio.run(coroutine))
    except TeacherError as error:
        future.set_exception(error)
    return future


def rechecked(first, then, *, interval: int = 1, rollouts: int = 2) -> tuple[TeacherRecheck, SGLangTeacher]:
    """A recheck that took the fingerprint of `first` and has then met `then` for some rollouts."""
    teacher = teacher_of(then)
    recheck = TeacherRecheck(teacher, fingerprint_of(first), interval, at_once)
    for rollout in range(rollouts):
        recheck.begin(rollout)
        recheck.finish()
    return recheck, teacher


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3])
def test_a_teacher_that_stays_the_same_passes_with_its_own_noise(noise):
    recheck, teacher = rechecked(ScriptedTeacher(noise=noise), ScriptedTeacher(noise=noise), rollouts=20)
    assert recheck.drift <= 4 * noise
    assert not teacher.failures


CHANGES = {
    "another model": ScriptedTeacher(model=1),
    "raised by 5": ScriptedTeacher(lie=each(lambda value: min(value + 5, 0.0))),
    "lowered by a fifth of a nat": ScriptedTeacher(lie=each(lambda value: value - 0.2)),
    "shifted": ScriptedTeacher(lie=shifted(1)),
    "constant": ScriptedTeacher(lie=each(lambda value: -1.0)),
}


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_a_teacher_that_changes_in_the_middle_stops_the_run(changed):
    with pytest.raises(
        TeacherError, match=r"http://t:1 is not the one it was at the start of this run: .* differ by .* nats"
    ):
        rechecked(ScriptedTeacher(), changed)


def test_answers_that_cannot_be_scores_are_counted_failures_and_no_change():
    recheck, teacher = rechecked(ScriptedTeacher(), ScriptedTeacher(lie=each(np.exp)))
    assert recheck.drift is None
    assert teacher.failures.total() == 1
    recheck, teacher = rechecked(ScriptedTeacher(), lambda request: httpx.Response(500), rollouts=4)
    assert recheck.drift is None
    assert teacher.failures.total() == 3


def test_one_reading_that_is_off_is_taken_again_before_the_run_stops():
    off, right = ScriptedTeacher(model=1), ScriptedTeacher()
    servers = iter([off] * 4 + [right] * 100)
    recheck, _ = rechecked(ScriptedTeacher(), lambda request: next(servers)(request))
    assert recheck.drift == 0


def test_the_teacher_is_read_at_its_interval_and_never_with_an_interval_of_zero():
    def steps_read(interval: int) -> list[int]:
        seen = []
        recheck = TeacherRecheck(teacher_of(ScriptedTeacher()), fingerprint_of(ScriptedTeacher()), interval, at_once)
        for rollout in range(7):
            recheck.begin(rollout)
            if recheck.drift is not None:
                seen.append(rollout)
            recheck.drift = None
            recheck.finish()
        return seen

    assert steps_read(3) == [3, 6]
    assert steps_read(1) == [1, 2, 3, 4, 5, 6]
    assert steps_read(0) == []


def test_a_reading_that_is_still_out_delays_nothing_and_is_looked_at_later():
    out: list[Future[None]] = []

    def submit(coroutine) -> Future[None]:
        coroutine.close()
        out.append(Future())
        return out[-1]

    recheck = TeacherRecheck(teacher_of(ScriptedTeacher()), fingerprint_of(ScriptedTeacher()), 1, submit)
    for rollout in (1, 2):
        recheck.begin(rollout)
        recheck.finish()
    assert len(out) == 1  # no second one while the first is out
    out[0].set_exception(TeacherError("changed"))
    with pytest.raises(TeacherError, match="changed"):
        recheck.finish()
    recheck.begin(3)
    recheck.close()
    assert out[1].cancelled()


def test_a_resumed_run_compares_with_the_fingerprint_of_its_checkpoint():
    before = TeacherRecheck(teacher_of(ScriptedTeacher()), fingerprint_of(ScriptedTeacher()), 10, at_once)
    saved = json.loads(json.dumps(before.state()))

    def resumed(server, interval: int = 10, state=saved) -> float | None:
        recheck = TeacherRecheck(teacher_of(server), fingerprint_of(server), interval, at_once)
        asyncio.run(recheck.compare_saved(state))
        return recheck.drift

    assert resumed(ScriptedTeacher()) == 0
    with pytest.raises(TeacherError, match="is not the one it was when the checkpoint was saved"):
        resumed(ScriptedTeacher(model=1))
    assert resumed(ScriptedTeacher(model=1), interval=0) is None  # the way to go on with another teacher
    assert resumed(ScriptedTeacher(model=1), state=None) is None  # a checkpoint without one


def test_a_fingerprint_survives_json():
    fingerprint = fingerprint_of(ScriptedTeacher(noise=0.1))
    again = Fingerprint.from_json(json.loads(json.dumps(fingerprint.to_json())))
    assert (again.sequences, again.start, again.spread) == (
        fingerprint.sequences,
        fingerprint.start,
        fingerprint.spread,
    )
    assert distance(again.log_probs, fingerprint.log_probs) == 0


def test_the_distance_is_the_worst_sequences_median_so_that_few_tokens_that_jump_do_not_count():
    zeros = [np.zeros(5), np.zeros(5)]
    assert distance(zeros, [np.array([9.0, 9, 0, 0, 0]), np.zeros(5)]) == 0
    assert distance(zeros, [np.zeros(5), np.array([0, 0, 0.5, -0.5, 0.5])]) == 0.5


def test_the_fingerprint_is_taken_idle_and_busy():
    in_flight, most = 0, 0
    model = ScriptedTeacher()

    async def counting(request: httpx.Request) -> httpx.Response:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0)
        # Only a busy server has noise: that is the spread.
        answer = (ScriptedTeacher(lie=each(lambda value: value - 0.1)) if most > 1 else model)(request)
        in_flight -= 1
        return answer

    fingerprint = fingerprint_of(counting)
    assert most == 4
    assert fingerprint.spread == pytest.approx(
        0.05, abs=1e-6
    )  # half of the 0.1 between idle and busy: the middle is between
    assert fingerprint.tolerance == pytest.approx(0.2, abs=1e-5)
