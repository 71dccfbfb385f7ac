"""Rewards and filters, tried before a run: one sentence for each way in which one can fail, and no process left."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import save_tiny_tokenizer

from slime_opd import train
from slime_opd.config import parse
from slime_opd.errors import ConfigError
from slime_opd.preflight.findings import Findings
from slime_opd.preflight.inputs import inspect_inputs, load_inputs

FUNCTIONS = """
import os, sys, time, asyncio, subprocess
import numpy as np

NOT_A_FUNCTION = 1
def ours(sample): return len(sample.response) + float(sample.prompt.label == "2")
async def slimes(args, sample, **kwargs): return float(args.rollout_max_response_len + len(sample.label))
def numpy_bool(sample): return np.bool_(True)
def text(sample): return "good"
def nothing(sample): pass
def a_dict(args, sample): return {"score": 1.0}
def not_a_number(sample): return float("nan")
def three(a, b, c): return 1.0
def raises(sample): return sample.prompt.metadata["score"]
def raises_for_empty(sample): return 1 / len(sample.response)
def leaves(sample): sys.exit(0)
def dies(sample):
    print("the last arguments")
    sys.stdout.flush()
    os._exit(0)
def hangs(sample):
    child = subprocess.Popen(["sleep", "600"])
    with open(os.environ["TRIAL_PIDS"], "w") as file: file.write(f"{os.getpid()} {child.pid}")
    time.sleep(600)
async def hangs_async(sample): await asyncio.sleep(600)
def leaves_a_thread(sample):
    import threading
    threading.Thread(target=time.sleep, args=(600,)).start()
    return 1.0

def keeps(samples): return any(s.values["reward"][0] > 0 for s in samples)
class Decision:
    keep = True
def keeps_as_slime(args, samples, **kwargs): return Decision()
def keeps_none(samples): return None
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("rewards")
    save_tiny_tokenizer(root / "student")
    (root / "student" / "config.json").write_text('{"max_position_embeddings": 128, "vocab_size": 64}')
    (root / "train.jsonl").write_text('{"input": "1+1=", "label": "2"}\n' * 4)
    (root / "trial_rewards.py").write_text(FUNCTIONS)
    (root / "trial_syntax.py").write_text("def f(sample:\n")
    (root / "trial_dependency.py").write_text("import not_installed_here\ndef f(sample): return 1.0\n")
    (root / "trial_exit.py").write_text("import sys\nsys.exit()\n")
    (root / "trial_os_exit.py").write_text("import os\nos._exit(0)\n")
    return root


@pytest.fixture(autouse=True)
def importable(place, monkeypatch):
    monkeypatch.syspath_prepend(place)


def run(place, flags: str):
    return parse(
        shlex.split(
            f"--hf-checkpoint {place}/student --prompt-data {place}/train.jsonl --label-key label --num-rollout 1 --rollout-batch-size 2 "
            f"--n-samples-per-prompt 2 --rollout-max-response-len 8 --megatron-to-hf-mode bridge {flags}"
        )
    )


def findings(place, flags: str) -> Findings:
    found = Findings()
    inspect_inputs(run(place, flags), found)
    return found


@pytest.mark.parametrize(
    "function",
    ["ours", "slimes", "numpy_bool", "leaves_a_thread"],
)
def test_a_reward_of_either_signature_passes(place, function):
    found = findings(place, f"--custom-rm-path trial_rewards.{function}")
    assert found.problems == []
    assert f"--custom-rm-path trial_rewards.{function}: imported, tried on 2 made-up responses" in found.ok


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("text", "returned 'good' for a response to prompt 0; expected one finite number"),
        ("nothing", "returned None for a response to prompt 0; expected one finite number"),
        (
            "a_dict",
            "returned {'score': 1.0} for a response to prompt 0; expected one finite number: slime's --reward-key",
        ),
        ("not_a_number", "returned nan for a response to prompt 0; expected one finite number"),
        ("three", "takes (a, b, c), expected (sample) or slime's (args, sample)"),
        ("raises", "failed on a response to prompt 0: KeyError: 'score' ("),
        ("raises_for_empty", "ZeroDivisionError: division by zero"),
        ("leaves", "it calls sys.exit(0) (called with row 0 of --prompt-data and its label as the response)"),
        ("dies", "ends its process with code 0 while called with row 0 of --prompt-data"),
        ("NOT_A_FUNCTION", "'NOT_A_FUNCTION' of trial_rewards is 1, expected a function"),
        ("not_there", "trial_rewards has no function 'not_there'"),
    ],
)
def test_a_reward_that_cannot_work_is_one_sentence(place, function, sentence):
    [problem] = findings(place, f"--custom-rm-path trial_rewards.{function}").problems
    assert problem.startswith(f"--custom-rm-path trial_rewards.{function}: ")
    assert sentence in problem and "\n" not in problem


def test_the_sentence_names_the_made_up_response_the_line_and_the_last_output(place):
    [problem] = findings(place, "--custom-rm-path trial_rewards.raises_for_empty").problems
    assert "trial_rewards.py, line" in problem
    assert problem.endswith("(called with row 0 of --prompt-data and an empty response)")
    [problem] = findings(place, "--custom-rm-path trial_rewards.dies").problems
    assert problem.endswith("; its last output: the last arguments")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("trial_syntax.f", "trial_syntax.py, line 1: '(' was never closed"),
        ("trial_dependency.f", "trial_dependency imports not_installed_here, which is not installed here"),
        ("trial_exit.f", "importing trial_exit calls sys.exit"),
        ("trial_os_exit.f", "ends its process with code 0 while being imported"),
    ],
)
def test_check_ends_with_a_sentence_and_code_2_whatever_the_import_does(place, capsys, path, sentence):
    flags = f"--hf-checkpoint {place}/student --prompt-data {place}/train.jsonl --custom-rm-path {path} --megatron-to-hf-mode bridge"
    with pytest.raises(SystemExit) as left:
        train.main(["--check", *shlex.split(flags)])
    assert left.value.code == 2
    output = capsys.readouterr()
    assert sentence in " ".join(output.out.split())
    assert "Traceback" not in output.out + output.err


def test_a_reward_that_hangs_is_ended_with_all_that_it_started(place, tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    monkeypatch.setenv("TRIAL_PIDS", str(pids))
    started = time.monotonic()
    [problem] = findings(place, "--custom-rm-path trial_rewards.hangs --custom-function-timeout-s 5").problems
    assert "not done after 5 s while called with row 0 of --prompt-data" in problem
    assert "--custom-function-timeout-s" in problem
    assert time.monotonic() - started < 60
    child, grandchild = map(int, pids.read_text().split())
    # SIGKILL was sent to all of them; the kernel takes its time.
    wait_until(lambda: not is_running(child) and not is_running(grandchild))


def test_a_reward_that_hangs_ends_with_a_check_that_is_killed(place, tmp_path):
    pids = tmp_path / "pids"
    program = (
        "import sys; from slime_opd.preflight.reward import run_trial; from slime_opd.rollout.trial import RewardTask; "
        "from slime_opd.config import parse; from slime_opd.types import Prompt, Sample, Status; "
        "sample = Sample(Prompt(0, (1,), 'p', '2'), (), '', Status.COMPLETED); "
        "run_trial(RewardTask(parse(['--custom-rm-path', 'trial_rewards.hangs']), (('it', sample),)), 600)"
    )
    paths = os.pathsep.join([str(place), *sys.path])
    check = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths, "TRIAL_PIDS": str(pids)}
    )
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    child, grandchild = map(int, pids.read_text().split())
    environment = Path(f"/proc/{child}/environ").read_text().split("\0")
    (directory,) = (Path(entry.removeprefix("TMPDIR=")) for entry in environment if entry.startswith("TMPDIR="))
    assert [path.name.startswith("slime_opd_trial_") for path in directory.iterdir()] == [True]
    check.kill()
    check.wait()
    wait_until(lambda: not is_running(child) and not is_running(grandchild))
    wait_until(lambda: not directory.exists())


def wait_until(condition, limit_s=60.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_trial_can_be_skipped_and_that_is_not_silent(place):
    found = findings(place, "--custom-rm-path trial_rewards.text --custom-function-timeout-s 0")
    assert found.problems == []
    assert found.unchecked == ["--custom-rm-path trial_rewards.text: --custom-function-timeout-s is 0"]


def test_without_rows_a_reward_is_imported_and_its_signature_read(place, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    found = findings(place, f"--custom-rm-path trial_rewards.text --prompt-data {broken}")
    assert ["line 1: not valid JSON" in problem for problem in found.problems] == [True]
    assert found.unchecked == [
        "--custom-rm-path trial_rewards.text: it was imported but not called, for there is no row to call it with"
    ]
    found = findings(place, f"--custom-rm-path trial_rewards.three --prompt-data {broken}")
    assert any("takes (a, b, c), expected (sample)" in problem for problem in found.problems)


def test_a_reward_without_its_module_is_left_to_the_check_of_the_flag(place):
    assert findings(place, "--custom-rm-path no_such_module_at_all.f").problems == []


def test_the_reward_of_evaluation_is_tried_on_the_rows_of_evaluation(place, tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text('{"input": "1+1=", "label": null}\n')
    config = f"--eval-prompt-data small {path} --custom-rm-path"
    found = findings(place, f"{config} trial_rewards.slimes")
    assert ["of --eval-prompt-data small" in problem for problem in found.problems] == [True]
    assert "object of type 'NoneType' has no len()" in found.problems[0]
    assert findings(place, f"{config} trial_rewards.ours").problems == []


@pytest.mark.parametrize("rm_type", ["math", "exact_match"])
def test_a_built_in_reward_is_tried_on_the_label_of_row_0(place, rm_type):
    found = findings(place, f"--rm-type {rm_type}")
    assert found.problems == []
    assert f"reward {rm_type}: gives 1 when row 0 of --prompt-data is answered with its label" in found.ok


def test_a_worker_of_the_math_reward_that_does_not_start_is_a_problem(place, monkeypatch, tmp_path):
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr("slime_opd.reward.math._WORKER", broken)
    [problem] = findings(place, "--rm-type math").problems
    assert "its worker process exited with code 3" in problem


@pytest.mark.parametrize("function", ["keeps", "keeps_as_slime"])
def test_a_filter_of_either_signature_passes(place, function):
    found = findings(place, f"--rm-type exact_match --dynamic-sampling-filter-path trial_rewards.{function}")
    assert found.problems == []
    assert (
        f"--dynamic-sampling-filter-path trial_rewards.{function}: imported, tried on 2 made-up responses" in found.ok
    )


def test_a_filter_that_does_not_decide_is_one_sentence(place):
    [problem] = findings(
        place, "--rm-type exact_match --dynamic-sampling-filter-path trial_rewards.keeps_none"
    ).problems
    assert "--dynamic-sampling-filter-path trial_rewards.keeps_none returned None; expected True or False" in problem


def test_a_run_refuses_before_ray_what_check_refuses(place):
    with pytest.raises(ConfigError, match="returned None for a response to prompt 0"):
        load_inputs(run(place, "--custom-rm-path trial_rewards.nothing"))
    inputs = load_inputs(run(place, "--custom-rm-path trial_rewards.ours"))
    assert len(inputs.source) == 4
