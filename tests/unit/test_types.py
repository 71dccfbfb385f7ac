"""Samples and batches: alignment, unknown fields, missing fields, and one line for a new field."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_opd import fields
from slime_opd.errors import DataError
from slime_opd.metrics import values
from slime_opd.observe.metrics import batch_metrics
from slime_opd.types import Prompt, RolloutBatch, Sample, Status


def sample(index: int, prompt: int, response: int, **extra) -> Sample:
    made = Sample(Prompt(index, tuple(range(prompt)), "p"), tuple(range(100, 100 + response)), "r", Status.COMPLETED)
    made.set("loss_mask", np.ones(response))
    for name, value in extra.items():
        made.set(name, value)
    return made


def test_a_field_of_the_wrong_length_is_refused_with_both_lengths():
    with pytest.raises(DataError, match=r"'teacher_log_probs' has shape \(2,\), expected \(3,\)"):
        sample(7, 2, 3, teacher_log_probs=[0.0, 0.0])


def test_an_unknown_field_is_an_error_wherever_it_appears():
    with pytest.raises(DataError, match="unknown sample field 'techer_log_probs'"):
        sample(0, 1, 1, techer_log_probs=[0.0])
    with pytest.raises(DataError, match="one line"):
        RolloutBatch.from_samples([sample(0, 1, 1)]).with_column("new_field", [0.0])


def test_missing_values_are_filled_or_refused_as_the_table_says():
    batch = RolloutBatch.from_samples([sample(0, 1, 2, teacher_log_probs=[-1, -2]), sample(1, 1, 1)])
    np.testing.assert_array_equal(batch.columns["teacher_log_probs"], np.float32([-1, -2, np.nan]))
    with pytest.raises(DataError, match=r"'group' is missing in 1 of 2 samples \(prompts \[1\]\)"):
        RolloutBatch.from_samples([sample(0, 1, 1, group=0), sample(1, 1, 1)])


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=8), st.data())
def test_selecting_samples_is_laying_out_those_samples(lengths, data):
    samples = [sample(i, p, r, group=i, teacher_log_probs=np.arange(r) + 10 * i) for i, (p, r) in enumerate(lengths)]
    chosen = data.draw(st.lists(st.integers(0, len(samples) - 1), max_size=8))
    got = RolloutBatch.from_samples(samples).select(chosen)
    expected = [samples[i] for i in chosen]
    assert got.tokens.tolist() == [token for one in expected for token in one.tokens]
    assert got.columns["group"].tolist() == chosen
    assert got.columns["teacher_log_probs"].tolist() == [v for one in expected for v in one.values["teacher_log_probs"]]
    assert got.total_lengths.tolist() == [len(one.tokens) for one in expected]


def test_a_new_per_token_field_takes_one_line(monkeypatch):
    row = fields.Field("surprise", fields.RESPONSE, np.float32, float("nan"), "rollout/surprise")
    monkeypatch.setattr(fields, "TABLE", (*fields.TABLE, row))
    monkeypatch.setattr(fields, "BY_NAME", {**fields.BY_NAME, "surprise": row})
    batch = RolloutBatch.from_samples([sample(0, 1, 2, surprise=[1.0, 2.0]), sample(1, 1, 3)])
    assert batch.select([1, 0]).columns["surprise"][3:].tolist() == [1.0, 2.0]
    # The second sample's are missing, and in no denominator.
    assert values(batch_metrics(batch))["rollout/surprise"] == 1.5


def test_a_wide_field_holds_a_row_per_token_and_keeps_float16():
    one = sample(0, 1, 2, teacher_top_ids=[[1, 2], [3, 4]], teacher_top_log_probs=np.full((2, 2), -1, np.float16))
    batch = RolloutBatch.from_samples([one, sample(1, 1, 1)])
    assert batch.columns["teacher_top_ids"].dtype == np.int32
    assert batch.columns["teacher_top_log_probs"].dtype == np.float16
    assert batch.select([1, 0]).columns["teacher_top_ids"].tolist() == [[0, 0], [1, 2], [3, 4]]
    assert np.isnan(batch.select([1]).columns["teacher_top_log_probs"]).all()


def test_a_wide_field_of_another_shape_is_refused():
    with pytest.raises(
        DataError, match=r"'teacher_top_ids' has shape \(2,\), expected \(2, K\) \(one row per response"
    ):
        sample(0, 1, 2, teacher_top_ids=[1, 2])
    with pytest.raises(DataError, match=r"'teacher_top_ids' has \[1, 2\] values per token"):
        RolloutBatch.from_samples([sample(0, 1, 1, teacher_top_ids=[[1]]), sample(0, 1, 1, teacher_top_ids=[[1, 2]])])
