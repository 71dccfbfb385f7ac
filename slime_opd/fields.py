"""The field table: every array that travels with a sample is declared here, once.

A row says how long the array is (`level`), its `dtype`, what stands for a value that is
not there (`missing`), and whether its mean over trained tokens is logged
(`logged_as`). Sample, RolloutBatch, the packing and data-parallel split, the transport
to the trainer, and logging all read this table. So adding a per-token array to a
sample takes one line below, and using a name that is not here is an error where it
happens, never a silent drop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from slime_opd.errors import DataError

RESPONSE: Final = "response"
SAMPLE: Final = "sample"


@dataclass(frozen=True)
class Field:
    """One array of a sample.

    `level`: "response" is one value per response token (entry t is about response
    token t given everything before it); "sample" is one value per sample.
    `missing`: the value that fills in for a sample that does not carry the field;
    None means that every sample must carry it as soon as one does.
    `logged_as`: metric name of the mean (over tokens that train, or over samples;
    values that are NaN are in no denominator), or None.
    `wide`: each entry is a row of K values, the same K for all samples of a batch.
    `may_be_nan`: a trained token may have NaN, which means that there is no value.
    """

    name: str
    level: Literal["response", "sample"]
    dtype: type[np.generic]
    missing: float | None
    logged_as: str | None = None
    wide: bool = False
    may_be_nan: bool = False

    def array(self, values: object) -> np.ndarray:
        """`values` as a 1-D array, or 2-D where the field is wide, of this field's dtype; a float16 stays one."""
        array = np.asarray(values)
        if not (array.dtype == np.float16 and self.dtype is np.float32):
            array = array.astype(self.dtype, copy=False)
        return np.atleast_1d(array)


_NAN = float("nan")

TABLE: tuple[Field, ...] = (
    Field("loss_mask", RESPONSE, np.float32, 1.0),
    Field("rollout_log_probs", RESPONSE, np.float32, _NAN, "rollout/rollout_log_probs", may_be_nan=True),
    Field("teacher_log_probs", RESPONSE, np.float32, _NAN, "rollout/teacher_log_probs", may_be_nan=True),
    Field("log_probs", RESPONSE, np.float32, None),
    Field("penalty_log_probs", RESPONSE, np.float32, None, may_be_nan=True),
    Field("ref_log_probs", RESPONSE, np.float32, None),
    Field("advantages", RESPONSE, np.float32, None, "rollout/advantages"),
    Field("penalty_return", RESPONSE, np.float32, None, may_be_nan=True),
    Field("policy_weights", RESPONSE, np.float32, None),
    Field("penalty_weights", RESPONSE, np.float32, None),
    Field("divergence_base", RESPONSE, np.float32, None),
    Field("divergence_weights", RESPONSE, np.float32, None),
    Field("position_third", RESPONSE, np.float32, None),
    Field("correct", RESPONSE, np.float32, None, may_be_nan=True),
    Field("student_entropy", RESPONSE, np.float32, None),
    Field("token_divergence", RESPONSE, np.float32, None, may_be_nan=True),
    Field("student_top_ids", RESPONSE, np.int32, 0, wide=True),
    Field("teacher_top_ids", RESPONSE, np.int32, 0, wide=True),
    Field("teacher_top_log_probs", RESPONSE, np.float32, _NAN, wide=True),
    Field("teacher_on_student_log_probs", RESPONSE, np.float32, _NAN, wide=True),
    Field("candidate_ids", RESPONSE, np.int32, None, wide=True),
    Field("candidate_log_probs", RESPONSE, np.float32, None, wide=True),
    Field("candidate_teacher_log_probs", RESPONSE, np.float32, None, wide=True),
    Field("group", SAMPLE, np.int64, None),
    Field("reward", SAMPLE, np.float32, _NAN, "rollout/raw_reward"),
    Field("truncated", SAMPLE, np.float32, 0.0, "rollout/truncated_ratio"),
    Field("off_policy", SAMPLE, np.float32, 0.0),
    Field("teacher_failed", SAMPLE, np.float32, 0.0),
)

BY_NAME: dict[str, Field] = {row.name: row for row in TABLE}


def field(name: str) -> Field:
    """The row called `name`. Raises DataError for a name that is not in the table."""
    try:
        return BY_NAME[name]
    except KeyError:
        raise DataError(
            f"unknown sample field {name!r}: declare it with one line in slime_opd/fields.py (known: {', '.join(BY_NAME)})"
        ) from None
