"""Packing: where a row's response tokens lie, with and without padding."""

import numpy as np
import pytest
import torch

from slime_opd.trainer.micro_batch import pack
from slime_opd.types import RolloutBatch

SAMPLES = RolloutBatch(
    np.arange(10, 21), np.array([2, 3]), np.array([4, 2]), {"loss_mask": np.ones(6, np.float32), "reward": np.zeros(2, np.float32)}
)  # fmt: skip


@pytest.mark.parametrize(("multiple", "missing"), [(1, 0), (2, 1), (4, 1), (11, 0), (8, 5)])
def test_a_row_is_padded_to_a_multiple_behind_the_samples(multiple, missing):
    row = pack(SAMPLES, slice(0, 6), torch.device("cpu"), multiple)
    assert row.tokens.tolist() == [[*range(10, 21), *[0] * missing]]
    assert row.position_ids.tolist() == [[*range(6), *range(5), *range(missing)]]
    assert row.packed.cu_seqlens_q.tolist() == [0, 6, 11, *([11 + missing] if missing else [])]
    # Response tokens, and the places before them, are never padding.
    assert row.targets.tolist() == [12, 13, 14, 15, 19, 20] and row.predicting.tolist() == [1, 2, 3, 4, 8, 9]
    assert row.response_lengths.tolist() == [4, 2]
