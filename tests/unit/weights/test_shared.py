"""Weights in shared memory: another process reads them, and no memory is left when the writer is killed."""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
from pathlib import Path

import torch

from slime_opd.weights.shared import SharedBucket

READER = """
import base64, io, pickle, sys
bucket = pickle.load(io.BytesIO(base64.b64decode(sys.argv[1])))
for part in bucket["metadata"]:
    tensor = bucket["flattened_tensor"][part.start_idx:part.end_idx].view(part.dtype).reshape(part.shape)
    print(part.name, tensor.dtype, tensor.tolist(), flush=True)
"""
WRITER = """
import os, signal, torch
from slime_opd.weights.shared import SharedBucket
bucket = SharedBucket([("a", torch.zeros(1 << 20))])
print(os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_unrelated_processes_can_open_all_tensors_of_a_bucket():
    bucket = SharedBucket([("a", torch.arange(5.0)), ("b", torch.tensor([[1.5], [2.5]], dtype=torch.bfloat16))])
    for handle in (bucket.handle(), bucket.handle()):
        # By way of a shell: the reader is no child of this process.
        run = subprocess.run(
            ["sh", "-c", '"$0" -c "$1" "$2"', sys.executable, READER, handle],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.stdout == "a torch.float32 [0.0, 1.0, 2.0, 3.0, 4.0]\nb torch.bfloat16 [[1.5], [2.5]]\n", run.stderr
    bucket.close()


def test_a_reader_has_its_values_after_the_bucket_was_closed_and_others_were_made():
    first = SharedBucket([("a", torch.full((1000,), 1.0))])
    opened = pickle.loads(base64.b64decode(first.handle()))["flattened_tensor"]
    first.close()
    second = SharedBucket([("a", torch.full((1000,), 2.0))])
    assert opened.view(torch.float32).tolist()[:1000] == [1.0] * 1000
    second.close()


def test_a_closed_bucket_frees_its_memory():
    before = len(os.listdir("/proc/self/fd"))
    for size in (10, 1000, 100):
        bucket = SharedBucket([("a", torch.zeros(size))])
        assert len(os.listdir("/proc/self/fd")) == before + 1
        bucket.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert "slime_opd_weights" not in Path("/proc/self/maps").read_text()


def test_a_killed_writer_leaves_no_shared_memory():
    writer = subprocess.run([sys.executable, "-c", WRITER], capture_output=True, text=True, check=False)
    assert writer.returncode == -9, writer.stderr
    # torch's own sharing leaves torch_PID_… there.
    assert not list(Path("/dev/shm").glob(f"torch_{int(writer.stdout)}_*"))
