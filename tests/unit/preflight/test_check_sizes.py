"""Rollouts and processes that a machine cannot hold."""

from __future__ import annotations

from slime_opd.config import parse
from slime_opd.preflight import check_sizes
from slime_opd.preflight.rules import notes


def test_a_rollout_that_no_memory_holds_is_refused(monkeypatch):
    monkeypatch.setattr(check_sizes, "_memory_bytes", lambda: 16 * 2**30)
    arguments = "--rollout-max-response-len 1024 --n-samples-per-prompt 8 --rollout-batch-size"
    assert check_sizes.check_rollout_fits(parse([*arguments.split(), "4096"])) == []
    (problem,) = check_sizes.check_rollout_fits(parse([*arguments.split(), "1000000000000"]))
    # 8e12 samples of 500 + 20 · 1024 bytes.
    assert "the 8,000,000,000,000 samples of a rollout take 156,313,180 GiB" in problem and "has 16" in problem
    monkeypatch.setattr(check_sizes, "_memory_bytes", lambda: None)
    assert check_sizes.check_rollout_fits(parse([*arguments.split(), "1000000000000"])) == []


def test_more_processes_than_cores_can_run_are_refused_where_there_is_no_gpu():
    assert check_sizes.process_problem(trainers=6, engines=2, cores=2) is None
    problem = check_sizes.process_problem(trainers=64, engines=1, cores=2)
    assert "64 training processes and 1 of engines" in problem and "2 CPU cores" in problem
    assert check_sizes.process_problem(trainers=64, engines=1, cores=64) is None


def test_processes_are_counted_only_where_the_run_starts_its_own_ray_without_gpus(monkeypatch):
    monkeypatch.setattr(check_sizes, "_cores", lambda: 2)
    arguments = ["--actor-num-gpus-per-node", "64", "--ray-address"]
    assert len(check_sizes.check_processes(parse([*arguments, "local"]))) == 1
    assert check_sizes.check_processes(parse([*arguments, "auto"])) == []
    monkeypatch.setattr(check_sizes.Path, "glob", lambda *_: iter(["/dev/nvidia0"]))
    assert check_sizes.check_processes(parse([*arguments, "local"])) == []


def test_micro_batches_smaller_than_a_response_are_noted():
    arguments = "--use-dynamic-batch-size --rollout-max-response-len 512 --max-tokens-per-gpu"
    (note,) = (note for note in notes(parse([*arguments.split(), "10"])) if "max-tokens" in note)
    assert note.startswith("--max-tokens-per-gpu 10 is less than --rollout-max-response-len 512: a longer sample is")
    assert not [note for note in notes(parse([*arguments.split(), "512"])) if "max-tokens" in note]
