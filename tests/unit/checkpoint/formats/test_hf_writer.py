"""Writing a Hugging Face directory shard by shard: interrupted, resumed, refused, and read back."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime_opd.checkpoint.formats import hf_writer
from slime_opd.checkpoint.formats.hf_writer import WeightGroup, write
from slime_opd.checkpoint.manifest import MANIFEST
from slime_opd.checkpoint.safetensors_index import INDEX
from slime_opd.errors import CheckpointError

WEIGHTS = {f"model.layers.{n}.weight": torch.arange(16.0).reshape(4, 4) + n for n in range(5)}


@pytest.fixture
def origin(tmp_path):
    directory = tmp_path / "origin"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": {"bits": 8}}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / INDEX).write_text("{}")
    return directory


def groups(weights=WEIGHTS, *, fails_at: str | None = None, reads: list | None = None) -> list[WeightGroup]:
    def reading(name):
        def read():
            if name == fails_at:
                raise KeyboardInterrupt
            if reads is not None:
                reads.append(name)
            return {name: weights[name]}

        return read

    return [WeightGroup({name: (tuple(w.shape), w.dtype)}, reading(name)) for name, w in weights.items()]


def written(directory) -> dict[str, torch.Tensor]:
    return {name: w for file in directory.glob("*.safetensors") for name, w in load_file(file).items()}


def convert(origin, output, *, shard_bytes=128, overwrite=False, source="checkpoint", **more):
    return write(groups(**more), output, origin, shard_bytes=shard_bytes, overwrite=overwrite, source=source)


def test_shards_index_companions_and_checksums(origin, tmp_path):
    output = tmp_path / "output"
    assert convert(origin, output) == []
    index = json.loads((output / INDEX).read_text())
    assert index["metadata"] == {"total_size": 5 * 64}
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert all(load_file(output / file)[name].equal(WEIGHTS[name]) for name, file in index["weight_map"].items())
    assert json.loads((output / "config.json").read_text()) == {"dtype": "float32"}
    check = subprocess.run(["sha256sum", "--check", MANIFEST], cwd=output, capture_output=True, text=True, check=False)
    assert check.returncode == 0 and check.stdout.count(": OK") == 6
    assert {file.name for file in output.iterdir()} == {
        "config.json", "tokenizer.json", INDEX, MANIFEST, *index["weight_map"].values()
    }  # fmt: skip


def test_one_shard_needs_no_index(origin, tmp_path):
    convert(origin, tmp_path / "output", shard_bytes=10**6)
    assert written(tmp_path / "output").keys() == WEIGHTS.keys()
    assert not (tmp_path / "output" / INDEX).exists()


def test_an_interrupted_conversion_is_resumed(origin, tmp_path):
    output, reads = tmp_path / "output", []
    with pytest.raises(KeyboardInterrupt):
        convert(origin, output, fails_at="model.layers.3.weight")
    (output / "model-00002-of-00003.safetensors.partial").write_bytes(b"half a shard")
    assert convert(origin, output, reads=reads) == ["model-00001-of-00003.safetensors"]
    assert reads == [f"model.layers.{n}.weight" for n in (2, 3, 4)]
    assert all(written(output)[name].equal(weight) for name, weight in WEIGHTS.items())


def test_a_shard_that_changed_since_is_written_again(origin, tmp_path):
    output, reads = tmp_path / "output", []
    with pytest.raises(KeyboardInterrupt):
        convert(origin, output, fails_at="model.layers.4.weight")
    save_file({"other": torch.zeros(3)}, output / "model-00001-of-00003.safetensors")
    assert convert(origin, output, reads=reads) == ["model-00002-of-00003.safetensors"]
    assert reads == [f"model.layers.{n}.weight" for n in (0, 1, 4)]


@pytest.mark.parametrize("other", [{"source": "another"}, {"shard_bytes": 64}])
def test_the_files_of_another_conversion_are_refused_and_replaced_with_force(origin, tmp_path, other):
    output = tmp_path / "output"
    with pytest.raises(KeyboardInterrupt):
        convert(origin, output, fails_at="model.layers.4.weight")
    with pytest.raises(CheckpointError, match="is not empty; choose another --output-dir or add --force"):
        convert(origin, output, **other)
    assert convert(origin, output, overwrite=True, **other) == []
    assert written(output).keys() == WEIGHTS.keys()


def test_a_finished_output_is_refused_and_force_leaves_no_old_shard(origin, tmp_path):
    output = tmp_path / "output"
    convert(origin, output)
    with pytest.raises(CheckpointError, match="is not empty"):
        convert(origin, output)
    convert(origin, output, shard_bytes=10**6, overwrite=True)
    assert [file.name for file in output.glob("*.safetensors")] == ["model.safetensors"]
    assert not (output / INDEX).exists()


def test_a_shard_that_differs_from_what_was_written_is_detected(origin, tmp_path, monkeypatch):
    def bad_disk(state, path, metadata):
        save_file({name: weight + (name == "model.layers.2.weight") for name, weight in state.items()}, path)

    monkeypatch.setattr(hf_writer, "save_file", bad_disk)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.weight is not what was written; is the disk sound"):
        convert(origin, tmp_path / "output")
    assert not (tmp_path / "output" / "model-00002-of-00003.safetensors").exists()


def test_a_slice_of_a_larger_tensor_is_written_without_the_rest(origin, tmp_path):
    whole = torch.arange(64.0).reshape(16, 4)
    parts = {"a": whole[:4], "b": whole[4:8].T}
    write(groups(parts), tmp_path / "output", origin, shard_bytes=10**6, overwrite=False, source="")
    assert all(written(tmp_path / "output")[name].equal(part) for name, part in parts.items())
    assert (tmp_path / "output" / "model.safetensors").stat().st_size < 400


def test_a_full_disk_is_one_clear_error_and_the_same_conversion_is_resumed(origin, tmp_path, monkeypatch):
    output, written_shards = tmp_path / "output", []

    def full(state, path, metadata):
        if written_shards:
            raise OSError(28, "No space left on device", str(path))
        written_shards.append(path)
        save_file(state, path, metadata)

    with monkeypatch.context() as patched:
        patched.setattr(hf_writer, "save_file", full)
        with pytest.raises(CheckpointError) as refusal:
            convert(origin, output)
    sentence = str(refusal.value)
    assert sentence.startswith(f"{output} was not written: No space left on device (it needs about 320 bytes, ")
    assert sentence.endswith(
        "are free); once this is mended, the same command continues with the first shard that is missing"
    )
    assert convert(origin, output) == ["model-00001-of-00003.safetensors"]


def test_other_system_errors_are_not_reported_as_a_full_disk(origin, tmp_path, monkeypatch):
    def broken(state, path, metadata):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hf_writer, "save_file", broken)
    with pytest.raises(OSError, match="Input/output error"):
        convert(origin, tmp_path / "output")
