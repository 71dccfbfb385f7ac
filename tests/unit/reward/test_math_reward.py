"""The mathematical verifier: what counts as the answer, and comparisons that do not end.

The comparison itself is the worker's, called here in this process; two tests start a worker.
"""

import asyncio
import os
import subprocess
import sys
import threading
import time

import pytest

from slime_opd import lifetimes
from slime_opd.errors import DataError
from slime_opd.reward import math as math_module
from slime_opd.reward.math import MathReward
from slime_opd.reward.math_worker import is_equal
from slime_opd.reward.reward import compute_reward
from slime_opd.types import Prompt, Sample, Status


def sample(response, label="42"):
    return Sample(Prompt(3, (1,), "p", label), (2,), response, Status.COMPLETED)


@pytest.mark.parametrize(
    ("label", "answer", "expected"),
    [
        ("42", r"\boxed{42}", True),
        ("1/2", r"\boxed{0.5}", True),
        (r"\frac{1}{2}", r"\boxed{\dfrac12}", True),
        (r"\boxed{8}", r"\boxed{2^3}", True),
        ("$x^2+2x+1$", r"\boxed{(x+1)^2}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", True),
        ("34", "First 12, then 34.", True),
        ("34", "The answer is 34, not 12", True),
        ("42", r"\boxed{41}", False),
        ("42", "no number at all", False),
        ("42", "", False),
    ],
)
def test_answers_are_compared_as_mathematics(label, answer, expected):
    assert is_equal(label, answer) is expected


class Recorder(MathReward):
    """Keeps what would be sent to a worker."""

    def _compare(self, label, answer):
        self.sent = (label, answer)
        return 0.25


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{1} or \boxed{\frac{84}{2}}", r"\boxed{\frac{84}{2}}"),
        (r"<think>\boxed{42}</think>It is 41.", "It is 41."),
        ("It is 42.", "It is 42."),
    ],
)
def test_the_last_box_after_the_thoughts_is_compared_else_the_text_after_them(response, answer):
    reward = Recorder(workers=1)
    assert asyncio.run(reward(sample(response))) == 0.25
    assert reward.sent == ("42", answer)
    reward.close()


def test_a_box_that_holds_the_label_itself_needs_no_comparison():
    reward = Recorder(workers=1)
    assert asyncio.run(reward(sample(r"\boxed{ Evelyn }", label="Evelyn"))) == 1.0
    assert not hasattr(reward, "sent")
    reward.close()


def test_a_missing_label_is_an_error():
    reward = MathReward(workers=1)
    with pytest.raises(DataError, match="prompt 3 has none"):
        asyncio.run(reward(sample("42", label=None)))
    reward.close()


def test_workers_compare_off_the_main_thread_and_one_that_overruns_is_ended_and_replaced(caplog):
    reward = MathReward(workers=1, limit_s=1)
    scores = {}

    def score_all():
        for name, response in (
            ("endless", r"\boxed{9^{9^{9^{9}}}}"),
            ("right", "so \\boxed{\\frac{84}{2}} \ud800"),
            ("wrong", "41"),
        ):
            scores[name] = asyncio.run(reward(sample(response)))

    started = time.monotonic()
    thread = threading.Thread(target=score_all)
    thread.start()
    thread.join()
    process = reward._workers[0]._process
    reward.close()
    assert scores == {"endless": 0.0, "right": 1.0, "wrong": 0.0}
    assert time.monotonic() - started < 12  # most of it is starting two workers
    assert "was ended by signal 14 (limit: 1 s): reward 0" in caplog.text
    assert process.returncode is not None  # close leaves no process


def test_a_worker_that_cannot_start_is_an_error_and_not_a_reward_of_zero(tmp_path, monkeypatch):
    broken = tmp_path / "math_worker.py"
    broken.write_text("import no_such_module_of_a_verifier\n")
    monkeypatch.setattr(math_module, "_WORKER", broken)
    reward = MathReward(workers=1)
    with pytest.raises(DataError, match=r"reward math failed .* prompt 3: .*exited with code 1"):
        asyncio.run(compute_reward(reward, sample("41")))
    reward.close()


def test_a_worker_that_is_computing_dies_with_its_killed_owner():
    program = (
        "import asyncio, subprocess, sys\n"
        "from slime_opd import lifetimes\n"
        "from slime_opd.reward.math import _Worker\n"
        "scope = lifetimes.own()\n"
        "worker = _Worker(600)\n"
        "worker.compare('42', '41')\n"
        "print(scope, worker._process.pid, flush=True)\n"
        "worker.compare('42', r'\\boxed{9^{9^{9^{9}}}}')\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    scope, worker = owner.stdout.readline().split()
    assert int(worker) in lifetimes.processes_in_scope(scope)
    # Not the owner's group: a signal to that would end the comparison as a wrong answer.
    assert os.getpgid(int(worker)) != os.getpgid(owner.pid)
    owner.kill()
    owner.communicate()
    deadline = time.monotonic() + 20
    while lifetimes.processes_in_scope(scope) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lifetimes.processes_in_scope(scope) == []
