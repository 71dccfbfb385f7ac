"""Whole runs of `python -m slime_opd.train`: real Megatron-core, SGLang and Ray, as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import save_tiny_tokenizer
from model_families import save_model

from slime_opd import lifetimes
from slime_opd.engine.ports import free_port
from slime_opd.engine.server import EngineProcess
from slime_opd.observe.report import read_metrics

pytestmark = pytest.mark.e2e

TIMEOUT_S = 240
PROMPTS = 64


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Prompts with responses; no label, as in pure distillation."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"{i}+{i * 7 % 10}=", "response": str(i + i * 7 % 10)} for i in range(PROMPTS)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def command(model_dir: Path, prompts: Path, run_dir: Path, *flags: str) -> list[str]:
    """The words of a small run."""
    common = ["--hf-checkpoint", str(model_dir), "--megatron-to-hf-mode", "bridge", "--ray-address", "local"]
    data = ["--prompt-data", str(prompts), "--input-key", "prompt", "--rollout-shuffle", "--run-dir", str(run_dir)]
    batch = ["--rollout-batch-size", "8", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "512"]
    return [sys.executable, "-m", "slime_opd.train", *common, *data, *batch, *flags]


def distillation(model_dir: Path, prompts: Path, run_dir: Path, *flags: str) -> list[str]:
    """The words of a small run that generates: one response per prompt, no label, no reward."""
    return command(model_dir, prompts, run_dir, "--rollout-max-response-len", "12", *flags)


def start(words: list[str], log: Path) -> subprocess.Popen:
    # A file and not a pipe: processes of the engines may hold a pipe open after the run.
    with log.open("ab") as output:
        return subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def run(words: list[str], log: Path) -> tuple[int, str]:
    """Exit code and output of a run."""
    process = start(words, log)
    try:
        return process.wait(timeout=TIMEOUT_S), log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def records(run_dir: Path) -> list[dict]:
    """The metrics of a run's training steps, a record per line."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [record for record in lines if "train/loss" in record]


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    """Wait until a run has logged a step."""
    deadline = time.monotonic() + TIMEOUT_S
    while not any(record["step"] >= step for record in records(run_dir)):
        assert process.poll() is None, f"the run ended with {process.returncode} before step {step}"
        assert time.monotonic() < deadline, f"no step {step} within {TIMEOUT_S} s"
        time.sleep(0.02)


def test_a_teacher_server_that_is_the_student_has_no_reverse_kl(tiny_model_dir, engine_server, prompts, tmp_path):
    flags = [
        "--use-opd",
        "--opd-type",
        "sglang",
        "--rm-url",
        f"{engine_server.url}/generate".replace("http://", "http://me:hunter2@"),
        "--opd-teacher-check-interval",
        "1",
        "--num-rollout",
        "2",
        "--lr",
        "0",
    ]
    code, output = run(
        distillation(tiny_model_dir, prompts, tmp_path / "run", *flags, "--check-weight-update-equal"),
        tmp_path / "log",
    )
    assert code == 0, output[-3000:]
    steps = records(tmp_path / "run")
    assert [record["step"] for record in steps] == [1, 2]
    for record in steps:
        assert abs(record["opd/reverse_kl"]) < 1e-5
        # What is left is the rounding of two engines, 1e-6 per token, times the steep gradient of this sharp random
        # model; test_layouts.py has the same teacher in the trainer itself, where the gradient is 0 to 1e-5.
        assert record["train/grad_norm"] < 0.05
        assert record["opd/teacher_fallback_fraction"] == 0
        assert record["train/train_rollout_logprob_abs_diff"] < 1e-4
    assert "opd/teacher_drift" not in steps[0]  # the start has just looked at the teacher
    assert steps[1]["opd/teacher_drift"] < 1e-4
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert (tmp_path / "run" / "config.yaml") in files
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []
    assert "hunter2" not in output and "teacher " in output and "http://***@" in output


def test_top_k_of_a_teacher_server_that_is_the_student_has_no_divergence(
    tiny_model_dir, engine_server, prompts, tmp_path
):
    flags = ["--use-opd", "--opd-type", "sglang", "--rm-url", f"{engine_server.url}/generate"]
    flags += ["--opd-divergence", "reverse_kl", "--opd-log-prob-top-k", "4", "--opd-top-k-strategy", "union"]
    # A fourth of the responses is the teacher's own; half of the samples train in each step.
    flags += ["--opd-off-policy-fraction", "0.25", "--num-steps-per-rollout", "2", "--num-rollout", "2", "--lr", "0"]
    recordings = str(tmp_path / "rollouts" / "{rollout_id}.parquet")
    generating = distillation(
        tiny_model_dir, prompts, tmp_path / "run", *flags, "--save-debug-rollout-data", recordings
    )
    code, output = run(generating, tmp_path / "log")
    assert code == 0, output[-3000:]
    steps = records(tmp_path / "run")
    assert [record["step"] for record in steps] == [1, 2]
    for record in steps:
        assert abs(record["opd/distribution_reverse_kl"]) < 1e-5 and abs(record["opd/divergence"]) < 1e-5
        assert record["opd/overlap_ratio"] > 0.99
        assert record["opd/teacher_fallback_fraction"] == 0
        assert record["rollout/off_policy_ratio"] == 0.25
        assert record["train/grad_norm"] < 0.05
        # Four ids and eight log-probs per token, beside the sampled one.
        assert 200 < record["perf/teacher_bytes_per_token"] < 600
    # Replayed without an engine, a teacher's server and the prompts, under the same weights: the same numbers, bit for
    # bit.
    flags[flags.index("--rm-url") + 1] = "http://127.0.0.1:9/generate"
    replaying = distillation(
        tiny_model_dir, tmp_path, tmp_path / "replay", *flags, "--load-debug-rollout-data", recordings
    )
    code, output = run(replaying, tmp_path / "replay_log")
    assert code == 0, output[-3000:]
    for before, after in zip(steps, records(tmp_path / "replay"), strict=True):
        trained = {name for name in before if name.startswith(("train/", "opd/"))} - {"opd/teacher_drift"}
        assert {"train/loss", "train/grad_norm", "opd/divergence", "opd/overlap_ratio"} <= trained
        assert {name: after[name] for name in trained} == {name: before[name] for name in trained}
    assert not (tmp_path / "replay" / "logs" / "engine_0.log").exists()


def test_at_another_temperature_the_penalty_is_still_taken_at_the_teachers(
    tiny_model_dir, engine_server, prompts, tmp_path
):
    flags = [
        "--use-opd",
        "--opd-type",
        "sglang",
        "--rm-url",
        f"{engine_server.url}/generate",
        "--num-rollout",
        "1",
        "--lr",
        "0",
    ]
    flags += ["--rollout-temperature", "0.7", "--num-steps-per-rollout", "2"]
    code, output = run(distillation(tiny_model_dir, prompts, tmp_path / "run", *flags), tmp_path / "log")
    assert code == 0, output[-3000:]
    assert "temperature 1" in output
    (record,) = records(tmp_path / "run")
    assert abs(record["opd/reverse_kl"]) < 1e-5
    assert record["train/train_rollout_logprob_abs_diff"] < 1e-4


@pytest.mark.parametrize(
    ("transport", "more"),
    [
        # Each engine opens the memory of the trainer rank that would share its GPU.
        ("tensor", ["--colocate", "--actor-num-gpus-per-node", "2", "--tensor-model-parallel-size", "2"]),
        ("broadcast", ["--rollout-num-gpus", "2"]),
        ("disk", ["--num-steps-per-rollout", "2"]),
    ],
)
def test_weights_arrive_by_every_transport(transport, more, tiny_model_dir, prompts, tmp_path):
    # Two engines stand behind the router; reference and teacher take turns in the trainer.
    flags = ["--use-opd", "--opd-type", "megatron", "--opd-teacher-load", str(tiny_model_dir), "--num-rollout", "2"]
    flags += [
        "--use-kl-loss",
        "--kl-loss-coef",
        "0.1",
        "--kl-loss-type",
        "low_var_kl",
        "--ref-load",
        str(tiny_model_dir),
    ]
    flags += ["--lr", "1e-3", "--entropy-coef", "0.1", "--update-weight-transport", transport, *more]
    code, output = run(
        distillation(tiny_model_dir, prompts, tmp_path / "run", *flags, "--check-weight-update-equal"),
        tmp_path / "log",
    )
    assert code == 0, output[-3000:]
    assert "identical" in output
    last = records(tmp_path / "run")[-1]
    assert last["step"] == 2
    # The entropy bonus has moved the student off both by now.
    assert last["train/kl_loss"] > 0 and last["opd/reverse_kl"] != 0
    assert last["train/train_rollout_logprob_abs_diff"] < 1e-4


def test_a_mixture_of_experts_is_distilled_over_two_ranks(prompts, tmp_path):
    """Experts over two ranks, a Megatron teacher, and an engine with the trainer's weights after each step."""
    model = tmp_path / "model"
    save_model(model, "GLM-4.5")
    save_tiny_tokenizer(model)
    flags = ["--use-opd", "--opd-type", "megatron", "--opd-teacher-load", str(model), "--entropy-coef", "0.1"]
    flags += [
        "--actor-num-gpus-per-node",
        "2",
        "--expert-model-parallel-size",
        "2",
        "--lr",
        "1e-3",
        "--num-rollout",
        "2",
    ]
    words = distillation(model, prompts, tmp_path / "run", *flags, "--check-weight-update-equal")
    code, output = run(words, tmp_path / "log")
    assert code == 0, output[-3000:]
    first, second = records(tmp_path / "run")
    assert abs(first["opd/reverse_kl"]) < 1e-5 and second["opd/reverse_kl"] != 0
    for record in (first, second):
        assert record["train/train_rollout_logprob_abs_diff"] < 1e-4


def wait_until_nothing_is_left_of(scope: str) -> None:
    """Wait until no process of a run is left; it is killed from outside, so nothing but its warden can end them."""
    deadline = time.monotonic() + 30
    while (left := lifetimes.processes_in_scope(scope)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def test_a_killed_run_continues_as_if_it_had_not_been_killed(tiny_model_dir, prompts, tmp_path):
    """The very same command, without --load: nothing is lost, and what is done again is told apart."""

    def words(name: str) -> list[str]:
        flags = ["--loss-type", "sft_loss", "--label-key", "response", "--num-rollout", "12", "--lr", "1e-3"]
        flags += [
            "--save",
            str(tmp_path / name),
            "--save-interval",
            "2",
            "--save-hf",
            f"{tmp_path}/{name}_{{rollout_id}}",
        ]
        return command(tiny_model_dir, prompts, tmp_path / f"{name}_run", *flags)

    code, output = run(words("whole"), tmp_path / "whole_log")
    assert code == 0, output[-3000:]
    process = start(words("killed"), tmp_path / "killed_log")
    try:
        wait_for_step(process, tmp_path / "killed_run", 5)
        scope = lifetimes.scope_of_process(process.pid)
        assert len(lifetimes.processes_in_scope(scope)) > 4  # the driver, its warden, a trainer, Ray's own
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    wait_until_nothing_is_left_of(scope)
    code, output = run(words("killed"), tmp_path / "resumed_log")
    assert code == 0, output[-3000:]
    assert "resumed --save" in output and "options that differ" not in output
    assert f"{tmp_path / 'killed_run'} (attempt 2)" in output
    assert "finished: 12 rollouts" in output and str(tmp_path / "killed" / "iter_0000012") in output
    assert len({record["attempt"] for record in records(tmp_path / "killed_run")}) == 2
    read = read_metrics(tmp_path / "killed_run")
    assert [record["step"] for record in read if "train/loss" in record] == list(range(1, 13))
    for step in (2, 12):
        checksums = {(tmp_path / f"{name}_{step}" / "manifest.sha256").read_text() for name in ("whole", "killed")}
        assert len(checksums) == 1, f"the weights after step {step} differ"
    expected = {record["step"]: record["train/loss"] for record in records(tmp_path / "whole_run")}
    # The last word on a step is the resumed run's, where it did the step again.
    got = {record["step"]: record["train/loss"] for record in records(tmp_path / "killed_run")}
    assert got.keys() == expected.keys() == set(range(1, 13))
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)], ids=str)
def test_a_run_that_is_ended_while_its_engine_starts_leaves_nothing(number, code, tiny_model_dir, prompts, tmp_path):
    """At that time every kind of process is there, SGLang's own have not yet bound themselves to their parent, and Ray
    has just taken the signals.
    """
    flags = ["--use-opd", "--opd-type", "megatron", "--opd-teacher-load", str(tiny_model_dir), "--num-rollout", "2"]
    process = start(distillation(tiny_model_dir, prompts, tmp_path / "run", *flags), tmp_path / "log")
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not (tmp_path / "run/logs/engine_0.log").exists():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        scope = lifetimes.scope_of_process(process.pid)
        assert lifetimes.processes_in_scope(f"{scope}/engine-0")
        process.send_signal(number)
        assert process.wait(timeout=TIMEOUT_S) == code
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    wait_until_nothing_is_left_of(scope)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("limit", ["1.0", "0.1"])
def test_a_teacher_killed_in_the_middle_ends_the_run_only_above_the_limit_and_a_killed_scheduler_always(
    limit, tiny_model_dir, prompts, tmp_path
):
    port = free_port()
    with EngineProcess(tiny_model_dir, port=port, log_path=tmp_path / "teacher_log") as teacher:
        teacher.wait_ready(TIMEOUT_S)
        flags = ["--use-opd", "--opd-type", "sglang", "--rm-url", f"http://127.0.0.1:{port}/generate"]
        flags += ["--num-rollout", "400", "--opd-teacher-retries", "0", "--opd-max-fallback-fraction", limit]
        flags += ["--opd-kl-coef", "1", "--opd-divergence", "jsd", "--opd-log-prob-top-k", "4"]
        flags += ["--opd-top-k-strategy", "union"]
        process = start(distillation(tiny_model_dir, prompts, tmp_path / "run", *flags), tmp_path / "log")
        try:
            wait_for_step(process, tmp_path / "run", 2)
            teacher.stop(grace_s=0)
            if limit == "1.0":
                wait_for_step(process, tmp_path / "run", len(records(tmp_path / "run")) + 3)
                killed_at = kill_scheduler(process)
            code = process.wait(timeout=TIMEOUT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    output = (tmp_path / "log").read_text()
    steps = records(tmp_path / "run")
    assert code == 1 and "Traceback" not in output
    if limit == "1.0":
        assert steps[-1]["opd/teacher_fallback_fraction"] == 1
        assert not {"opd/reverse_kl", "opd/divergence"} & steps[-1].keys(), "a mean over nothing is left out, not zero"
        assert steps[-1]["train/grad_norm"] == 0
        # The launcher lives on and takes requests that nobody answers: only the watchdog ends this.
        assert time.monotonic() - killed_at < 60
        assert "slime_opd: error: engine 0 died (scheduler, process" in output, output[-3000:]
        assert "no checkpoint was written, because --save is not set" in output
    else:
        assert "--opd-max-fallback-fraction" in output and "one reason: " in output


def kill_scheduler(run: subprocess.Popen) -> float:
    """Kill the scheduler of a run's engine; returns when."""
    (scheduler,) = (
        child.pid
        for child in psutil.Process(run.pid).children(recursive=True)
        if child.cmdline()[:1] and child.cmdline()[0].startswith("sglang::scheduler")
    )
    os.kill(scheduler, signal.SIGKILL)
    return time.monotonic()


def test_wrong_flags_are_one_sentence_and_exit_code_2_at_once(tiny_model_dir, prompts, tmp_path):
    words = distillation(tiny_model_dir, prompts, tmp_path / "run", "--use-opd", "--num-rollout", "1")
    started = time.monotonic()
    finished = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - started < 5
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1 and "--opd-type" in finished.stderr
    assert finished.stdout == ""
