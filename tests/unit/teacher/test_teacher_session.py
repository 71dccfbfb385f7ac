"""A run's teacher: probed at the start, compared with a checkpoint's, measured in the rollouts, closed at the end."""

from __future__ import annotations

import json

import httpx
import pytest
from scripted_teacher import SIZE, Characters, ScriptedTeacher

from slime_opd.engine.client import EngineClient
from slime_opd.errors import TeacherError
from slime_opd.rollout.loop import BackgroundLoop
from slime_opd.teacher.session import TeacherSession
from slime_opd.teacher.sglang import SGLangTeacher
from slime_opd.types import Prompt, Sample, Status

SAMPLE = Sample(Prompt(0, (4, 5), ""), (6, 7, 8, 9), "", Status.COMPLETED)


@pytest.fixture
def student(tmp_path) -> str:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": SIZE, "eos_token_id": 1}))
    return str(tmp_path)


@pytest.fixture
def loop():
    with BackgroundLoop() as loop:
        yield loop


def started(server, loop, student: str, saved=None, check_interval: int = 1) -> TeacherSession:
    client = EngineClient("http://t:1", concurrency=4, timeout_s=5, retries=0, transport=httpx.MockTransport(server))
    session = TeacherSession(SGLangTeacher(client), loop, check_interval)
    session.start(Characters(), student, saved)
    return session


def test_a_rollouts_metrics_are_the_bytes_of_its_own_requests_and_the_drift_once_it_was_read(loop, student, capsys):
    session = started(ScriptedTeacher(), loop, student)
    assert "teacher big at http://t:1, 100 tokens in its vocabulary" in capsys.readouterr().out
    session.begin_rollout(0)
    before = session.teacher.num_bytes
    loop.run(session.teacher.score(SAMPLE))
    metrics = session.end_rollout([SAMPLE, SAMPLE])
    assert list(metrics) == ["perf/teacher_bytes_per_token"]
    mean = metrics["perf/teacher_bytes_per_token"]
    assert (mean.total, mean.count) == (session.teacher.num_bytes - before, 8)
    assert mean.total > 0
    session.begin_rollout(1)
    session._recheck._reading.result(10)
    assert session.end_rollout([SAMPLE])["opd/teacher_drift"].value == 0
    session.close()


def test_a_resumed_run_refuses_another_teacher_than_its_checkpoints(loop, student):
    session = started(ScriptedTeacher(), loop, student)
    saved = json.loads(json.dumps(session.state()))
    started(ScriptedTeacher(), loop, student, saved).close()
    with pytest.raises(TeacherError, match="is not the one it was when the checkpoint was saved"):
        started(ScriptedTeacher(model=1), loop, student, saved)
    started(ScriptedTeacher(model=1), loop, student, saved, check_interval=0).close()
