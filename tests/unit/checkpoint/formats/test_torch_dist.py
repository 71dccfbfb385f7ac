"""Reading torch_dist checkpoints piece by piece."""

from __future__ import annotations

import os
import pickle

import pytest

from slime_opd.checkpoint.formats import torch_dist
from slime_opd.errors import CheckpointError


def test_a_checkpoint_that_names_a_function_is_not_read_by_the_conversion(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'made'}",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match=r"\.metadata names posix\.system, which no checkpoint needs"):
        torch_dist.Reader(tmp_path)
    assert not (tmp_path / "made").exists()
