"""The checks that read the source without running it: ruff (lint, format, length of prose) and mypy."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Files in which mypy still finds something; only shrinks.
FILES_WITH_TYPE_ERRORS: set[str] = {
    "slime_opd/batch/plan.py",
    "slime_opd/checkpoint/differences.py",
    "slime_opd/checkpoint/formats/hf_to_torch_dist.py",
    "slime_opd/checkpoint/formats/torch_dist_to_hf.py",
    "slime_opd/checkpoint/formats/verification.py",
    "slime_opd/cluster/checkpoints.py",
    "slime_opd/cluster/engines.py",
    "slime_opd/cluster/run.py",
    "slime_opd/cluster/session.py",
    "slime_opd/cluster/trainers.py",
    "slime_opd/config/attention.py",
    "slime_opd/config/check_distillation.py",
    "slime_opd/config/check_learning.py",
    "slime_opd/config/check_megatron.py",
    "slime_opd/config/check_run.py",
    "slime_opd/config/config.py",
    "slime_opd/config/hf_config.py",
    "slime_opd/config/megatron_options.py",
    "slime_opd/config/options.py",
    "slime_opd/config/parser.py",
    "slime_opd/data/source.py",
    "slime_opd/distill/candidates.py",
    "slime_opd/distill/comparison.py",
    "slime_opd/distill/dynamics.py",
    "slime_opd/head/objective_head.py",
    "slime_opd/head/output_layer.py",
    "slime_opd/head/teacher_comparison.py",
    "slime_opd/hooks.py",
    "slime_opd/metrics.py",
    "slime_opd/model/bridge.py",
    "slime_opd/model/device.py",
    "slime_opd/model/experts.py",
    "slime_opd/model/norm.py",
    "slime_opd/model/parallel.py",
    "slime_opd/model/post_norm.py",
    "slime_opd/model/transformer_config.py",
    "slime_opd/objective/policy.py",
    "slime_opd/objective/responses.py",
    "slime_opd/preflight/check.py",
    "slime_opd/preflight/check_architecture.py",
    "slime_opd/preflight/check_files.py",
    "slime_opd/preflight/check_lengths.py",
    "slime_opd/preflight/check_packages.py",
    "slime_opd/preflight/check_sglang.py",
    "slime_opd/preflight/data.py",
    "slime_opd/preflight/memory_estimate.py",
    "slime_opd/preflight/reward.py",
    "slime_opd/preflight/teacher.py",
    "slime_opd/preflight/weights.py",
    "slime_opd/rehearsal/groups.py",
    "slime_opd/rehearsal/memory.py",
    "slime_opd/rehearsal/step.py",
    "slime_opd/rehearsal/syncs.py",
    "slime_opd/rollout/dynamic_sampling.py",
    "slime_opd/rollout/manager.py",
    "slime_opd/rollout/off_policy.py",
    "slime_opd/teacher/fingerprint.py",
    "slime_opd/teacher/probe.py",
    "slime_opd/teacher/session.py",
    "slime_opd/teacher/sglang.py",
    "slime_opd/trainer/heads.py",
    "slime_opd/trainer/loading.py",
    "slime_opd/trainer/scoring.py",
    "slime_opd/trainer/trainer.py",
    "tools/convert_hf_to_torch_dist.py",
    "tools/write_flags_page.py",
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_ruff_finds_nothing():
    checked = run("ruff", "check", "--quiet", "--output-format=concise")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_ruff_would_change_no_format():
    formatted = run("ruff", "format", "--check", "--quiet")
    assert formatted.returncode == 0, formatted.stdout + formatted.stderr


def test_mypy_finds_no_type_error_in_a_file_that_had_none():
    checked = run("mypy", "--no-error-summary", "--hide-error-context")
    assert checked.returncode in (0, 1), checked.stdout + checked.stderr
    files = set(re.findall(r"^(\S+?):\d+: error: ", checked.stdout, re.MULTILINE))
    assert files == FILES_WITH_TYPE_ERRORS, checked.stdout
