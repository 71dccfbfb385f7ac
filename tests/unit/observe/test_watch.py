"""Who is waited for: lines at growing intervals, stopped processes, and the end. Times are made up."""

from __future__ import annotations

import pytest

from slime_opd.observe.watch import Findings, ProcessView, Status, Watch

TRAINER, ENGINE = ProcessView("trainer rank 0", Status.ALIVE), ProcessView("engine 0", Status.ALIVE)
STOPPED = ProcessView("trainer rank 0", Status.STOPPED, "process 12")


def looks(watch: Watch, times, processes=(TRAINER, ENGINE)) -> list[tuple[float, str]]:
    """The lines of looks at these times, each with its time."""
    return [(now, line) for now in times for line in watch.look(now, processes).lines]


def test_a_line_about_a_wait_has_activity_duration_and_processes():
    watch = Watch(60, 0)
    watch.begin("rollout 3/100", 0)
    watch.advance(30, 5, "samples")
    assert looks(watch, range(0, 90)) == []
    assert looks(watch, [90]) == [
        (90, "nothing has advanced for 60 s: rollout 3/100 for 90 s, 5 samples done; trainer rank 0, engine 0 alive")
    ]


def test_the_interval_between_lines_about_one_wait_grows():
    watch = Watch(60, 0)
    watch.begin("training 3/100", 0)
    told = [now for now, _ in looks(watch, range(0, 60 * 60))]
    assert told == [60, 120, 240, 480, 960, 1560, 2160, 2760, 3360]


def test_a_slow_run_that_advances_is_not_mentioned():
    watch = Watch(60, 1800)
    watch.begin("rollout 1/1", 0)
    for now in range(0, 7200, 50):
        watch.advance(now, 1, "samples")
        assert watch.look(now + 49, [TRAINER, ENGINE]) == Findings()


def test_progress_resets_the_interval_and_an_activity_its_count():
    watch = Watch(10, 0)
    watch.begin("rollout 1/2", 0)
    assert len(looks(watch, range(0, 30))) == 2
    watch.advance(30, 3, "samples")
    assert [now for now, _ in looks(watch, range(30, 45))] == [40]
    watch.end(45)
    watch.begin("training 1/2", 45)
    ((_, line),) = looks(watch, [55])
    assert "training 1/2 for 10 s; trainer" in line


def test_nothing_is_reported_between_activities():
    assert looks(Watch(1, 2), range(0, 1000)) == []


def test_the_innermost_activity_is_reported():
    watch = Watch(10, 0)
    watch.begin("rollout 1/2", 0)
    watch.begin("sending weights", 5)
    assert "sending weights" in looks(watch, [15])[0][1]
    watch.end(20)
    assert watch.activity == "rollout 1/2" and "rollout 1/2 for 30 s" in looks(watch, [30])[0][1]


def test_the_timeout_ends_the_run_with_the_same_message():
    watch = Watch(0, 100)
    watch.begin("saving after 4 rollouts", 0)
    assert watch.look(99, [TRAINER]) == Findings()
    failure = watch.look(100, [TRAINER]).failure
    assert "100 s (--watchdog-timeout-s 100): saving after 4 rollouts for 100 s" in failure


@pytest.mark.parametrize("waits", [True, False])
def test_a_dead_process_ends_the_run_whether_it_is_waited_for_or_not(waits):
    watch = Watch(60, 0)
    if waits:
        watch.begin("rollout 1/1", 0)
    dead = ProcessView("engine 0", Status.DEAD, "scheduler, process 7")
    assert watch.look(1, [TRAINER, dead]).failure == "engine 0 died (scheduler, process 7)"


def test_a_stopped_process_is_mentioned_once_and_when_it_responds_again():
    watch = Watch(60, 0)
    watch.begin("training 1/1", 0)
    assert looks(watch, range(0, 10), [STOPPED]) == []
    assert looks(watch, range(10, 31), [STOPPED]) == [
        (10, "trainer rank 0 is stopped (process 12), for 10 s so far; waiting for it")
    ]
    assert looks(watch, [31], [TRAINER]) == [
        (31, "waited 31 s for trainer rank 0, which was stopped; it responds again")
    ]
    assert looks(watch, [32], [TRAINER]) == []


def test_a_short_stop_is_not_mentioned():
    watch = Watch(60, 0)
    watch.begin("training 1/1", 0)
    assert looks(watch, range(0, 9), [STOPPED]) + looks(watch, range(9, 20), [TRAINER]) == []


def test_a_server_that_does_not_answer_is_named_in_the_line_and_others_are_counted():
    watch = Watch(5, 0)
    watch.begin("rollout 1/1", 0)
    ranks = [ProcessView(f"trainer rank {rank}", Status.ALIVE) for rank in range(8)]
    teacher = ProcessView("the teacher http://h:1", Status.SILENT)
    ((_, line),) = looks(watch, [5], [*ranks, teacher])
    assert line.endswith("the teacher http://h:1 does not answer; 8 others alive")
