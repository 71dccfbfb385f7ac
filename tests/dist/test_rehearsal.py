"""One training step of a shallow model with Qwen3-8B's widths, on simulated CUDA: waits, memory and kernels.

Not run here, as in every rehearsal: Transformer Engine's layers, kernels and their scratch memory, NCCL.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slime_opd.rehearsal.syncs import BLOCKING_COPY, READ, SYNCHRONIZE

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs torch's CPU build"),
]
ROOT = Path(__file__).parents[2]
GIB = 2**30

# Every wait of the host for the device in a step, and how often: whoever adds one adds it here, with a reason.
WAITS = {
    # One number for the skipped step, one for the norm that is logged, and the metrics: each once a step, after all work is queued.
    (READ, "slime_opd/trainer/finite.py non_finite"): 1,
    (READ, "megatron/core/optimizer/clip_grads.py get_grad_norm_fp32"): 1,
    (READ, "slime_opd/trainer/trainer.py _collect"): 1,
    (READ, "slime_opd/trainer/trainer.py _collect.<locals>.<dictcomp>"): 1,
}
# The teacher's weights come in, and the student's go out and come back, each once a rollout.
SWAPS = {(SYNCHRONIZE, "slime_opd/model/device.py synchronize"): 3}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> dict:
    program = Path(__file__).with_name("rehearsed_steps.py")
    run = subprocess.run(
        [sys.executable, program, tmp_path_factory.mktemp("rehearsal")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


CASES = ("penalty", "divergence")


@pytest.mark.parametrize(("case", "expected"), [("penalty", WAITS), ("divergence", WAITS | SWAPS)])
def test_the_host_waits_for_the_device_only_where_that_is_listed(rehearsed, case, expected):
    assert {(kind, line): count for kind, line, count in rehearsed[case]["waits"]} == expected


@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_what_was_estimated(rehearsed, case):
    estimate = rehearsed[case]["estimate"]
    assert sum(estimate.values()) == pytest.approx(rehearsed[case]["peak"], rel=0.03)
    # Weights and gradients alone would be near enough to the peak, so the rest has to fit by itself.
    standing = estimate["weights"] + estimate["gradients"] + estimate["optimizer"]
    rest, expected = rehearsed[case]["peak"] - standing, sum(estimate.values()) - standing
    assert rest > 2 * GIB and expected == pytest.approx(rest, rel=0.1)


@pytest.mark.parametrize("case", CASES)
def test_a_step_ends_with_the_memory_it_began_with(rehearsed, case):
    estimate, after = rehearsed[case]["estimate"], rehearsed[case]["after"]
    standing = [estimate.get(name, 0) for name in ("weights", "gradients", "optimizer", "teacher's output layer")]
    assert after["optimizer"] == pytest.approx(sum(standing), rel=0.03)


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_those_of_a_gpu(rehearsed, case):
    kernels = rehearsed[case]["kernels"]
    assert not [name for name in kernels if "cpu" in name]
    assert "aten._fused_adamw_.default" in kernels and "aten._fused_rms_norm.default" in kernels
    assert [name for name in kernels if "attn" in name or "attention" in name]


def test_the_optimizer_needs_no_copy_of_the_gradients(rehearsed):
    """Of torch's many-tensor kernels it would: 4 bytes for each parameter of the rank's share."""
    case = rehearsed["penalty"]
    grown = case["peaks"]["optimizer"] - case["after"]["optimizer"]
    # Clipping scales one gradient at a time, in a copy; the embedding's is the largest.
    assert grown < 1.1 * 4 * 151936 * 4096 // 2 < 4 * case["parameters"] / 2


def test_a_save_takes_no_memory_of_the_device(rehearsed):
    case = rehearsed["divergence"]
    assert case["peaks"]["save"] <= case["after"]["optimizer"] * 1.01


# Two micro-batches of 3,584 response tokens, in chunks of 1,024 for each tensor-parallel rank.
@pytest.mark.parametrize(("case", "chunks", "per_chunk"), [("penalty", 4, 300), ("divergence", 8, 600)])
def test_the_head_launches_no_more_kernels_than_it_did(rehearsed, case, chunks, per_chunk):
    assert 50 < rehearsed[case]["counts"]["head"] / chunks < per_chunk


def test_memory_and_kernels_of_known_operations_are_counted(rehearsed):
    known = rehearsed["known"]
    assert (known["peak"], known["end"], known["kernels"]) == (8 * 2**20, 4 * 2**20, 1)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("item", {READ: 1}), ("bool", {READ: 1}), ("tolist", {READ: 1}), ("cpu", {READ: 1}), ("tensor of a tensor", {READ: 2}),
        ("to the device", {BLOCKING_COPY: 1}), ("to the device later", {}), ("synchronize", {SYNCHRONIZE: 1}),
        ("on the host", {}), ("on the device", {}),
    ],
)  # fmt: skip
def test_a_wait_of_the_host_is_recorded(rehearsed, operation, expected):
    assert rehearsed["known"]["waits"][operation] == expected
