"""The shell scripts parse, say what they were given, and stop what they start."""

import json
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from model_families import family_config
from model_scripts import MODELS, PARAMETERS, bash, model_arguments

from slime_opd.config import parse
from slime_opd.config.attention import kernels_of
from slime_opd.config.checks import CHECKS, problems
from slime_opd.config.kernels import Kernels, Machine
from slime_opd.preflight.check_architecture import check_architecture_flags
from slime_opd.preflight.family_tensors import expected_tensors

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/on_policy_distillation"
RUNS = sorted(EXAMPLES.glob("run-*.sh"))


def flags_of(run: Path, base: Path) -> list[str]:
    dry = bash(f"'{run}' --seed 7", DRY_RUN="1", BASE=str(base))
    assert (dry.returncode, dry.stderr) == (0, "")
    return dry.stdout.splitlines()


def test_the_readmes_denser_objectives_are_runs_that_make_sense():
    lines = re.findall(r"^BASE=\S+ (examples/\S+\.sh) (--opd-kl-coef.*)$", (EXAMPLES / "README.md").read_text(), re.M)
    assert len(lines) == 3
    for script, flags in lines:
        dry = bash(f"'{ROOT / script}' {flags}", DRY_RUN="1", BASE="/models")
        assert (dry.returncode, dry.stderr) == (0, "")
        assert problems(parse(dry.stdout.splitlines()), CHECKS) == [], flags


@pytest.mark.parametrize(
    "script",
    [*MODELS, *EXAMPLES.glob("*.sh"), *(ROOT / "tools").glob("*.sh"), *(ROOT / "benchmarks").glob("*.sh")],
    ids=lambda p: p.name,
)
def test_every_script_is_valid_bash(script):
    check = bash(f"bash -n '{script}'")
    assert (check.returncode, check.stderr) == (0, "")


@pytest.mark.parametrize("script", MODELS, ids=lambda script: script.stem)
def test_a_model_script_sets_model_args_and_nothing_else(script):
    before, after = (set(bash(f"{source} compgen -v").stdout.split()) for source in ("true;", f"source '{script}';"))
    assert after - before == {"MODEL_ARGS"}


@pytest.mark.parametrize("script", MODELS, ids=lambda script: script.stem)
def test_a_model_scripts_flags_describe_the_published_model(script, tmp_path):
    from model_families import family_config, number_of_parameters

    words = model_arguments(script)
    model = parse(words).model
    name, architecture = family_config(script.stem, parse(words))
    assert number_of_parameters(name, architecture) == PARAMETERS[script.stem]
    assert (model.swiglu, model.disable_bias_linear, model.normalization) == (True, True, "RMSNorm")
    architecture.save_pretrained(tmp_path)
    assert check_architecture_flags(parse([*words, "--hf-checkpoint", str(tmp_path)])) == []


def test_every_model_script_is_checked():
    assert {script.stem for script in MODELS} == set(PARAMETERS)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.stem)
def test_the_flags_of_a_run_script_fit_together(run, tmp_path):
    assert problems(parse(flags_of(run, tmp_path)), CHECKS) == []


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.stem)
def test_a_run_script_trains_and_evaluates_on_math_data_as_it_is_laid_out(run, tmp_path):
    config = parse(flags_of(run, tmp_path))
    data, evaluation = config.data, config.evaluation
    assert (data.input_key, data.label_key, data.apply_chat_template) == ("prompt", "reward_model.ground_truth", True)
    assert data.prompt_data == f"{tmp_path}/dapo-math-17k.parquet"
    assert evaluation.eval_prompt_data == ("math500", f"{tmp_path}/math500.parquet")
    assert (evaluation.eval_interval, evaluation.eval_rm_type) == (20, "math")
    assert config.training.seed == 7  # flags after the script's name come last


def test_the_two_run_scripts_have_the_two_kinds_of_teacher(tmp_path):
    server, trainer = (parse(flags_of(EXAMPLES / f"run-qwen3-8B-opd{kind}.sh", tmp_path)) for kind in ("", "-megatron"))
    assert (server.opd.opd_type, server.reward.rm_url) == ("sglang", "http://127.0.0.1:13141/generate")
    assert (trainer.opd.opd_type, trainer.opd.opd_teacher_load) == ("megatron", f"{tmp_path}/Qwen3-8B_torch_dist")


def test_ray_never_sees_the_teachers_gpus():
    text = (EXAMPLES / "run-qwen3-8B-opd.sh").read_text()
    ray, teacher = (
        re.search(rf"^{name}=\${{{name}:-(.*)}}$", text, re.M)[1].split(",") for name in ("RAY_GPUS", "TEACHER_GPUS")
    )
    assert not set(ray) & set(teacher)
    assert len(ray) + len(teacher) == 8


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.stem)
def test_the_gpus_a_run_script_gives_ray_are_those_its_flags_use(run, tmp_path):
    cluster = parse(flags_of(run, tmp_path)).cluster
    gpus = re.search(r"^RAY_GPUS=\${RAY_GPUS:-(.*)}$", run.read_text(), re.M)[1].split(",")
    assert len(gpus) == cluster.actor_num_nodes * cluster.actor_num_gpus_per_node + cluster.rollout_num_gpus


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.stem)
def test_a_missing_checkpoint_is_one_sentence_and_nothing_starts(run, tmp_path):
    started = bash(f"'{run}'", BASE=str(tmp_path), PATH="/usr/bin:/bin")
    assert started.returncode == 1
    assert re.fullmatch(
        r"error: STUDENT: found no directory .*, expected the Hugging Face checkpoint of .*\n", started.stderr
    )
    assert list(tmp_path.iterdir()) == []


def common(program: str, base: Path) -> subprocess.CompletedProcess[str]:
    return bash(f"source '{EXAMPLES}/../common.sh'\n{program}", BASE=str(base))


def is_running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_script_stops_what_it_started_with_its_children_and_nothing_else(tmp_path):
    other = subprocess.Popen(["sleep", "100"], start_new_session=True)
    try:
        run = common(
            'start "$LOGS/log" bash -c "sleep 100 & wait"\necho "$PID"; pgrep -g "$PID" || true; exit 3', tmp_path
        )
        assert run.returncode == 3
        pids = {int(word) for word in run.stdout.split()}
        assert pids
        assert not any(is_running(pid) for pid in pids)
        assert is_running(other.pid)
    finally:
        other.kill()
        other.wait()


def test_a_signal_stops_a_script_while_its_command_runs(tmp_path):
    program = f'source "{EXAMPLES}/../common.sh"\nrun bash -c "echo \\$\\$; exec sleep 100"'
    environment = {**os.environ, "BASE": str(tmp_path)}
    with subprocess.Popen(["bash", "-c", program], env=environment, stdout=subprocess.PIPE, text=True) as script:
        pid = int(script.stdout.readline())
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=20) == 128 + signal.SIGTERM
    assert not is_running(pid)


def test_a_server_that_ends_or_never_answers_is_reported_with_the_end_of_its_log(tmp_path):
    url = "http://127.0.0.1:9/health"
    ended = common(
        f'start "$LOGS/log" bash -c "echo broken; exit 1"\nwait_for_url teacher {url} "$PID" "$LOGS/log" 30', tmp_path
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("broken\nerror: teacher ended before it was ready")
    start = time.monotonic()
    late = common(
        f'start "$LOGS/log" bash -c "echo slow; sleep 100"\nwait_for_url teacher {url} "$PID" "$LOGS/log" 1', tmp_path
    )
    assert late.returncode == 1
    assert late.stderr.startswith("slow\nerror: teacher was not ready after 1 seconds")
    assert time.monotonic() - start < 20


def test_a_checkpoint_is_converted_once_and_never_half(tmp_path):
    tool = tmp_path / "python"
    tool.write_text('#!/bin/bash\nmkdir -p "${!#}"; echo tool ran\n[ -z "${BROKEN:-}" ]\n')
    tool.chmod(0o755)
    program = f"PYTHON='{tool}'; MODEL_ARGS=(--num-layers 1); convert_once in '{tmp_path}/out'; convert_once in '{tmp_path}/out'"
    broken = common(f"export BROKEN=1; {program}", tmp_path)
    assert broken.returncode != 0
    assert not (tmp_path / "out").exists()
    done = common(program, tmp_path)
    assert (done.returncode, done.stdout.count("tool ran")) == (0, 1)
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("script", MODELS, ids=lambda script: script.stem)
def test_the_tensors_that_check_expects_are_the_published_models(script):
    _, config = family_config(script.stem, parse(model_arguments(script)))
    values = json.loads(config.to_json_string(use_diff=False))
    started = time.perf_counter()
    total = sum(math.prod(shape) for shape in expected_tensors(values).values())
    assert time.perf_counter() - started < 5  # a mixture of 94 layers and 128 experts: 0.02 s where nothing else runs
    assert total == pytest.approx(PARAMETERS[script.stem], rel=1e-5)


HOPPER = Machine(has_cuda=True, compute_capability=(9, 0), engine="2.11.0")


@pytest.mark.parametrize("script", MODELS, ids=lambda script: script.stem)
def test_every_model_has_transformer_engines_fused_attention_on_hopper(script):
    # Interleaved pairs, and latent attention without yarn, are rotated by Megatron's own formula.
    fuses_rope = not script.stem.startswith(("glm4-", "moonlight"))
    expected = Kernels(uses_engine=True, attention="engine", rope_fusion=fuses_rope)
    assert kernels_of(parse([*model_arguments(script), "--bf16"]), HOPPER) == expected


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.stem)
def test_no_example_asks_for_a_kernel_that_nothing_installs(run, tmp_path):
    words = flags_of(run, tmp_path)
    assert kernels_of(parse(words), HOPPER) == Kernels(uses_engine=True, attention="engine", rope_fusion=True)
