"""The drill on scripted runs: one that takes a kill well, and one for each fault that the drill is there to see."""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path

import pytest
from drill.kinds import KINDS, SFT, Phase
from drill.lineage import Lineage, Setting
from drill.plan import Trial
from drill.results import FINISHED, Result
from drill.stacks import Material

STEPS = 18

# A run with a checkpoint at every third step, as the drill sees one: metrics, `.partial` directories, a tracker file.
# Each start holds at a step, or in a save, so that a kill finds it there however busy the machine is.
RUN = f"""
import json, os, signal, subprocess, sys, time
from pathlib import Path

save, fault, holds = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
(save / "run").mkdir(parents=True, exist_ok=True)
starts, tracker, partial = save / "starts", save / "latest_checkpointed_iteration.txt", save / "iter.partial"
start = int(starts.read_text()) if starts.exists() else 0
starts.write_text(str(start + 1))
hold = holds[start] if start < len(holds) else ""
saved = int(tracker.read_text()) if tracker.exists() else 0
if saved and fault == "refuses":
    sys.exit("slime_opd: error: the checkpoint is damaged")
if saved and fault == "stalls":
    signal.pause()
if saved and fault != "silent":
    print("resumed", flush=True)
first = {{"begins anew": 1, "skips a step": saved + 1 + (saved > 0)}}.get(fault, saved + 1)
def end(number, frame):
    print(f"slime_opd: {{signal.Signals(number).name}}: ending", flush=True)
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, signal.SIG_IGN if fault == "hangs" else end)
signal.signal(signal.SIGHUP, lambda number, frame: sys.exit(128 + number))
if fault == "leaves a process":
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
for step in range(first, {STEPS} + 1):
    record = {{"step": step, "time": time.time(), "train/loss": 1.0, "perf/train_time": 0.01}}
    if fault != "mixes attempts":
        record["attempt"] = start
    with (save / "run" / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(record) + "\\n")
    if hold == f"step {{step}}":
        signal.pause()
    if step % 3 == 0:
        partial.mkdir(exist_ok=True)
        if hold == f"save {{step}}":
            signal.pause()
        partial.rmdir()
        tracker.write_text(str(step))
"""


def drill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, *trials: Trial, holds: str = "step 4"
) -> list[Result]:
    """The results of a scripted run with a fault, put through these kills, and of further runs for what is left."""
    program = tmp_path / "run.py"
    program.write_text(RUN)
    monkeypatch.setattr("drill.lineage.rollouts", lambda stack: STEPS)
    monkeypatch.setattr(
        "drill.lineage.command",
        lambda stack, material, save, teacher_url: [sys.executable, "-S", str(program), str(save), fault, holds],
    )
    setting = Setting(tmp_path, None, None, {}, lambda line: None, hang_limit_s=1.0, clean_limit_s=1.0, stop_s=0.2)
    queue, results, runs = deque(trials), [], 0
    while queue or not runs:
        runs += 1
        lineage = Lineage(setting, SFT, f"run_{runs}")
        lineage.run(queue)
        results += lineage.results
    return results


def trial(kind: str, phase: Phase = Phase.TRAIN, after: int = 4) -> Trial:
    return Trial(1, KINDS[kind], SFT, phase, after, 0.5)


def test_a_run_that_recovers_from_its_kills_has_no_problem(tmp_path, monkeypatch):
    kills = [trial("driver-kill"), trial("driver-term", Phase.SAVE), trial("group-kill", after=1)]
    results = drill(tmp_path, monkeypatch, "none", *kills, holds="step 4,save 6,step 4")
    assert [(result.kind, result.code, result.problems) for result in results] == [
        ("driver-kill", -9, []),
        ("driver-term", 143, []),
        ("group-kill", -9, []),
        (FINISHED, 0, []),
    ]
    assert all(result.steps_known for result in results[:3])


def test_a_closed_terminal_reaches_the_run_as_a_hang_up(tmp_path, monkeypatch):
    results = drill(tmp_path, monkeypatch, "none", trial("terminal-closed"))
    assert [result.code for result in results] == [129, 0]
    assert results[0].problems == []


@pytest.mark.parametrize(
    ("fault", "kind", "expected"),
    [
        ("leaves a process", "driver-kill", "left after 1 s: another process"),
        ("begins anew", "driver-kill", "a checkpoint of step 3 and did steps 1 to 18: 0 lost"),
        ("skips a step", "driver-kill", "1 lost, 0 doubled"),
        ("silent", "driver-kill", "did not print that it resumed"),
        ("hangs", "driver-term", "hung for 1 s"),
        ("none", "trainer-stop", "not done after 3 tries: no trainer rank at the chosen moments"),
        ("stalls", "driver-kill", "the same command did not resume: no progress for 2 s"),
        ("refuses", "driver-kill", "the same command did not finish: exit code 1"),
    ],
)
def test_each_fault_is_seen(fault, kind, expected, tmp_path, monkeypatch):
    if fault == "stalls":
        monkeypatch.setattr("drill.attempt.PROGRESS_LIMIT_S", 2)
    results = drill(tmp_path, monkeypatch, fault, trial(kind), holds="step 4" if kind.startswith("driver") else "")
    (kill,) = (result for result in results if result.kind == kind)
    assert expected in "; ".join(kill.problems)


def test_attempts_that_the_metrics_do_not_tell_apart_are_a_problem_of_the_whole_run(tmp_path, monkeypatch):
    # Killed after step 4, it goes on at 4.
    kill, end = drill(tmp_path, monkeypatch, "mixes attempts", trial("driver-kill"))
    assert kill.problems == []
    assert end.problems == ["metrics.jsonl has several records of one attempt for steps [4]"]


def test_a_start_that_has_lost_a_warden_takes_no_other_kill(tmp_path):
    lineage = Lineage(Setting(tmp_path, Material(tmp_path, tmp_path), None, {}, print), SFT, "run")
    queue = deque([trial("gcs-kill")])
    lineage._survived = [Result(1, "warden-kill", SFT, "train")]
    assert lineage._take(queue) is None and len(queue) == 1
    lineage._survived = []
    assert lineage._take(queue) is not None
