"""Recorded rollouts: equal when read again, and refused in a sentence where they do not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slime_opd import fields
from slime_opd.config import Config
from slime_opd.config.stages import DivergenceConfig, OPDConfig, RewardConfig, RolloutConfig
from slime_opd.errors import ConfigError, DataError
from slime_opd.metrics import Concentration, Maximum, Mean, Replicated, Total
from slime_opd.rollout.recording import Recordings, require_trainable
from slime_opd.types import Prompt, Rollout, RolloutBatch, Sample, SampleGroup, Status

VOCABULARY = 50
PROMPTS_STATE = {"epoch": 1, "offset": 3, "rows": 7, "fingerprint": "abc", "rollout_shuffle": True, "rollout_seed": 4}
METRICS = {
    "perf/teacher_bytes_per_token": Mean(30.0, 7),
    "rollout/groups_left_out": Replicated(2),
    "a/total": Total(1.5),
    "a/maximum": Maximum(-1.0),
    "a/concentration": Concentration((1.0, 2.0), (0.5, 4.0)),
}


def every_field_of(response: int, seed: int) -> dict[str, np.ndarray]:
    """A value for every field that can travel with a sample: NaN, infinity, -0.0 and float16 among them."""
    random = np.random.default_rng(seed)
    values = {}
    for row in fields.TABLE:
        shape = (response, 3) if row.wide else (response if row.level == fields.RESPONSE else 1,)
        dtype = np.float16 if row.name == "teacher_top_log_probs" else row.dtype
        values[row.name] = random.integers(0, 40, shape).astype(dtype)
    values["teacher_log_probs"][:3] = [np.nan, -np.inf, -0.0][:response]
    return values


def a_rollout() -> Rollout:
    groups = []
    for number, lengths in enumerate([(4, 1), (0, 2)]):
        prompt = Prompt(
            number + 20,
            (1, 2, 3),
            "2+2=",
            ["4", None][number],
            {"tag": "sums", "deep": {"a": [1]}},
            [None, (4, 5)][number],
        )
        samples = []
        for index, length in enumerate(lengths):
            sample = Sample(prompt, tuple(range(length)), "né\x00", list(Status)[index])
            for name, value in every_field_of(length, 10 * number + index).items():
                if not (name == "reward" and index == 1):
                    sample.set(name, value)
            samples.append(sample)
        groups.append(SampleGroup(prompt, samples))
    return Rollout(groups, 3, PROMPTS_STATE, METRICS, {"update_weights": 0.5, "rollout": 2.25})


@pytest.fixture
def recordings(tmp_path) -> Recordings:
    return Recordings(str(tmp_path / "deep" / "rollout_{rollout_id}.parquet"), VOCABULARY)


def test_a_recording_is_read_as_it_was_written_bit_for_bit(recordings):
    written = a_rollout()
    file = recordings.write(7, written)
    assert file.name == "rollout_7.parquet"
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    read = recordings.read(7)
    for name in ("weights_version", "prompt_cursor", "metrics", "timings"):
        assert getattr(read, name) == getattr(written, name), name
    assert [len(group.samples) for group in read.groups] == [2, 2]
    for before, after in zip(written.samples, read.samples, strict=True):
        assert (after.prompt, after.tokens, after.response) == (before.prompt, before.tokens, before.response)
        assert after.status is before.status
        assert set(after.values) == set(before.values)
        for name, value in before.values.items():
            assert (after.values[name].dtype, after.values[name].shape) == (value.dtype, value.shape), name
            assert after.values[name].tobytes() == value.tobytes(), name
    batches = [RolloutBatch.from_samples(rollout.samples) for rollout in (written, read)]
    for name, column in batches[0].columns.items():
        assert batches[1].columns[name].tobytes() == column.tobytes(), name


def test_a_recording_of_another_vocabulary_is_refused_with_both_sizes(recordings):
    recordings.write(1, a_rollout())
    with pytest.raises(DataError, match="a vocabulary of 50 tokens, --hf-checkpoint has 60"):
        replace(recordings, vocabulary_size=60).read(1)


def test_a_parquet_file_of_something_else_is_no_recording(recordings):
    recordings.file(1).parent.mkdir()
    pq.write_table(pa.table({"prompt": ["a"]}), recordings.file(1))
    with pytest.raises(DataError, match=r"rollout_1.parquet is no recorded rollout, expected a file that"):
        recordings.read(1)


def rewrite_metadata(recordings: Recordings, change) -> None:
    """Recording 1 with its metadata changed."""
    table = pq.read_table(recordings.file(1))
    metadata = json.loads(table.schema.metadata[b"slime_opd"])
    change(metadata)
    pq.write_table(table.replace_schema_metadata({b"slime_opd": json.dumps(metadata)}), recordings.file(1))


def test_a_recording_of_another_format_is_refused(recordings):
    recordings.write(1, a_rollout())
    rewrite_metadata(recordings, lambda metadata: metadata.update(format=99))
    with pytest.raises(DataError, match="has format 99, this version reads 1 and 2: record the rollout again"):
        recordings.read(1)


def test_a_recording_of_format_1_is_read_without_metrics_and_timings(recordings):
    recordings.write(1, a_rollout())

    def to_format_1(metadata: dict) -> None:
        del metadata["metrics"], metadata["timings"]
        metadata["format"] = 1

    rewrite_metadata(recordings, to_format_1)
    read = recordings.read(1)
    assert (read.weights_version, read.prompt_cursor, read.metrics, read.timings) == (3, PROMPTS_STATE, {}, {})
    assert len(read.samples) == 4


@pytest.mark.parametrize("metrics", [{"a": {"type": "Median"}}, {"a": {"type": "Mean"}}, {"a": 1.0}, [1]])
def test_metrics_of_an_unknown_type_are_refused(recordings, metrics):
    recordings.write(1, a_rollout())
    rewrite_metadata(recordings, lambda metadata: metadata.update(metrics=metrics))
    with pytest.raises(DataError, match=r"rollout_1.parquet is damaged: "):
        recordings.read(1)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_file_that_was_cut_is_refused_by_name(recordings, cut):
    file = recordings.write(1, a_rollout())
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"rollout_1.parquet is no complete Parquet file"):
        recordings.read(1)


@pytest.mark.parametrize(
    "column, values, problem",
    [
        ("teacher_log_probs", pa.array([[0.0]] * 4, pa.list_(pa.float32())), r"has shape \(1,\), expected \(4,\)"),
        ("response_tokens", pa.array([[99]] * 4, pa.list_(pa.int32())), "token ids outside the vocabulary of 50"),
        ("status", pa.array(["lost"] * 4), "lost"),
        ("prompt_metadata", pa.array(["{"] * 4), "is damaged"),
        ("prompt_tokens", None, "lacks the columns prompt_tokens"),
    ],
)
def test_a_column_that_is_not_a_rollouts_is_refused(recordings, column, values, problem):
    table = pq.read_table(recordings.write(1, a_rollout()))
    index = table.schema.get_field_index(column)
    table = table.drop_columns([column]) if values is None else table.set_column(index, column, values)
    pq.write_table(table, recordings.file(1))
    with pytest.raises(DataError, match=problem):
        recordings.read(1)


def test_missing_recordings_are_refused_before_the_run_with_the_rollouts_that_there_are(recordings):
    for number in (3, 4):
        recordings.write(number, a_rollout())
    recordings.require_all(range(3, 5))
    with pytest.raises(ConfigError, match=r"found rollouts 3 to 4 of .*, expected 3 to 9: give --num-rollout 4"):
        recordings.require_all(range(3, 10))
    with pytest.raises(ConfigError, match=r"found no file .*rollout_1.parquet, expected rollout 1, the run's first"):
        recordings.require_all(range(1, 3))


def test_a_path_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--save-debug-rollout-data: .* cannot be written: "):
        Recordings(str(tmp_path / "file" / "{rollout_id}"), VOCABULARY).write(1, a_rollout())


def test_a_rollout_without_the_teachers_scores_is_not_trained_on_with_a_teacher():
    rollout = a_rollout()
    config = Config(rollout=RolloutConfig(rollout_batch_size=2, n_samples_per_prompt=2))
    require_trainable(rollout, config)
    for sample in rollout.samples:
        del sample.values["teacher_top_ids"], sample.values["student_top_ids"]
    penalty = replace(config, opd=OPDConfig(use_opd=True, opd_type="sglang"))
    require_trainable(rollout, penalty)
    top_k = replace(penalty, divergence=DivergenceConfig(opd_divergence="reverse_kl", opd_log_prob_top_k=3))
    with pytest.raises(DataError, match=r"has no (teacher|student)_top_ids, which these options train on"):
        require_trainable(rollout, top_k)
    with pytest.raises(DataError, match=r"found 4 samples in groups of 2, expected 6 .* in groups of 2"):
        require_trainable(rollout, replace(config, rollout=RolloutConfig(rollout_batch_size=3, n_samples_per_prompt=2)))
    with pytest.raises(DataError, match=r"found 4 samples in groups of 2, expected 4 .* in groups of 4"):
        require_trainable(rollout, replace(config, rollout=RolloutConfig(rollout_batch_size=1, n_samples_per_prompt=4)))


def test_another_top_k_than_the_recorded_one_and_missing_rewards_are_refused():
    rollout = a_rollout()
    config = Config(rollout=RolloutConfig(rollout_batch_size=2, n_samples_per_prompt=2))
    config = replace(config, opd=OPDConfig(use_opd=True, opd_type="sglang"))
    for number in (3, 4):
        options = DivergenceConfig(opd_divergence="reverse_kl", opd_log_prob_top_k=number)
        config = replace(config, divergence=options)
        if number == 3:
            require_trainable(rollout, config)
            continue
        with pytest.raises(DataError, match=r"are of the top 3 tokens, these options ask for 4"):
            require_trainable(rollout, config)
    rewarded = Config(
        rollout=RolloutConfig(rollout_batch_size=2, n_samples_per_prompt=2), reward=RewardConfig(rm_type="math")
    )
    require_trainable(rollout, rewarded)
    for sample in rollout.samples:
        sample.values.pop("reward", None)
    with pytest.raises(DataError, match="has no reward, which these options train on"):
        require_trainable(rollout, rewarded)


def test_a_run_with_nothing_left_to_do_needs_no_recording(recordings):
    recordings.require_all(range(5, 5))
