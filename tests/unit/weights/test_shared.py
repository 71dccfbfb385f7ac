"""Weights in shared memory: another process reads them, and nothing of them is left when the writer is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from slime_opd.weights.shared import SharedBuffer

READER = """
import base64, io, pickle, sys
tensors = dict(pickle.load(io.BytesIO(base64.b64decode(sys.argv[1]))))
print(tensors["a"].tolist(), tensors["b"].dtype, tensors["b"].tolist(), flush=True)
"""
WRITER = """
import os, signal, torch
from slime_opd.weights.shared import SharedBuffer
buffer = SharedBuffer()
buffer.serialize([("a", torch.zeros(1 << 20))], 1)
print(os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_unrelated_process_opens_the_tensors_of_one_handle_in_any_number():
    buffer = SharedBuffer()
    tensors = [("a", torch.arange(5.0)), ("b", torch.tensor([[1.5], [2.5]], dtype=torch.bfloat16))]
    handles = buffer.serialize(tensors, 2)
    assert len(handles) == 2
    for handle in (*handles, handles[0]):
        # By way of a shell: the reader is no child of this process.
        run = subprocess.run(
            ["sh", "-c", '"$0" -c "$1" "$2"', sys.executable, READER, handle],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.stdout == "[0.0, 1.0, 2.0, 3.0, 4.0] torch.bfloat16 [[1.5], [2.5]]\n", run.stderr
    buffer.close()


def test_a_larger_bucket_takes_the_place_of_the_memory_before_and_close_lets_go_of_it():
    before = len(os.listdir("/proc/self/fd"))
    buffer = SharedBuffer()
    for size in (10, 1000, 100):
        buffer.serialize([("a", torch.zeros(size))], 1)
        assert len(os.listdir("/proc/self/fd")) == before + 1
    buffer.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_killed_writer_leaves_no_shared_memory():
    writer = subprocess.run([sys.executable, "-c", WRITER], capture_output=True, text=True, check=False)
    assert writer.returncode == -9, writer.stderr
    # torch's own sharing leaves torch_PID_… there.
    assert not list(Path("/dev/shm").glob(f"torch_{int(writer.stdout)}_*"))
