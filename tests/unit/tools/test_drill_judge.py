"""What a drill takes for a failure, and how it adds the outcomes up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from drill.attempt import delay_in_step
from drill.judge import problems_of
from drill.kinds import KINDS, Phase
from drill.results import FINISHED, Result, table

SENTENCE = "slime_opd: error: the engine's scheduler has ended\n"
GOOD = Result(1, "engine-scheduler-kill", "grpo", "train", code=1, seconds_to_end=2.0, seconds_to_clean=0.5)


def problems(result: Result, output: str = SENTENCE) -> list[str]:
    return problems_of(result, KINDS[result.kind], output, 10.0)


def test_a_run_that_ends_with_its_message_and_leaves_nothing_has_no_problem():
    assert problems(GOOD) == []


@pytest.mark.parametrize(
    ("change", "output", "expected"),
    [
        ({"code": -6}, SENTENCE, "exit code -6, expected 1"),
        ({"code": 0}, SENTENCE, "exit code 0, expected 1"),
        ({"code": None}, SENTENCE, "survived, expected it to end"),
        ({"code": None, "hung": True, "seconds_to_end": 90.0}, SENTENCE, "hung for 90 s"),
        ({}, "killed\n", "no line that starts with 'slime_opd: error: '"),
        ({}, f"Traceback (most recent call last):\n{SENTENCE}", "printed 'Traceback (most recent call last)'"),
        ({"left": ["engine scheduler 4711"]}, SENTENCE, "left after 10 s: engine scheduler 4711"),
        ({"shared_memory": ["torch_4711_1_0"]}, SENTENCE, "left in /dev/shm: torch_4711_1_0"),
    ],
)
def test_each_fault_is_a_problem_of_its_own(change, output, expected):
    assert problems(replace(GOOD, **change), output) == [expected]


def test_a_stopped_process_must_be_survived_and_a_killed_agent_may_be():
    stopped = replace(GOOD, kind="trainer-stop")
    assert problems(stopped) == ["exit code 1, expected it to survive"]
    assert problems(replace(stopped, code=None), "") == []
    agent = replace(GOOD, kind="ray-agent-kill")
    assert problems(replace(agent, code=None), "") == [] == problems(agent)
    assert problems(replace(agent, code=-6)) == ["exit code -6, expected 1"]


def test_a_signal_to_the_driver_is_answered_by_its_exit_code_and_name():
    told = replace(GOOD, kind="driver-term", code=143)
    assert problems(told, "\nslime_opd: SIGTERM: ending: nothing is unsaved\n") == []
    assert problems(told, "") == ["no line that starts with 'slime_opd: SIGTERM: '"]
    assert problems(replace(told, code=1), "slime_opd: SIGTERM: x\n") == ["exit code 1, expected 143"]
    killed = replace(GOOD, kind="driver-kill", code=-9)
    assert problems(killed, "") == []


def test_the_moment_of_a_kill_follows_from_the_durations_of_the_last_step():
    last = {"perf/update_weights_time": 1.0, "perf/rollout_time": 4.0, "perf/train_time": 2.0}
    assert delay_in_step(Phase.UPDATE_WEIGHTS, 0.5, last) == 0.5
    assert delay_in_step(Phase.GENERATE, 0.25, last) == 2.0
    assert delay_in_step(Phase.TRAIN, 0.5, last) == 6.0
    assert delay_in_step(Phase.TRAIN, 0.5, {"perf/train_time": 0.2}) == 0.1


def test_the_table_adds_up_kills_by_kind_and_keeps_the_runs_own_ends_apart():
    results = [
        GOOD,
        replace(GOOD, left=["a", "b"], problems=["left"], seconds_to_end=3.0, seconds_to_clean=None),
        Result(3, "driver-kill", "sft", "save", code=-9, lost=[4], doubled=[1, 2], bit_equal=True, problems=["steps"]),
        replace(GOOD, kind="driver-kill", bit_equal=False, code=None, hung=True, problems=["hung"]),
        Result(0, FINISHED, "sft", "end", code=0, bit_equal=True),
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(results).splitlines()]
    assert rows[2] == ["driver-kill", "2", "2", "0", "0", "1", "2.0", "0.5", "1", "2", "1 of 2"]
    assert rows[3] == ["engine-scheduler-kill", "2", "1", "2", "0", "0", "3.0", "0.5", "0", "0", "—"]
    assert rows[4] == ["**all kills**", "4", "3", "2", "0", "1", "3.0", "0.5", "1", "2", "1 of 2"]
    assert rows[5] == [FINISHED, "1", "0", "0", "0", "0", "—", "—", "0", "0", "1 of 1"]
