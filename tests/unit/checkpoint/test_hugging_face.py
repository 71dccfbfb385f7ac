"""Writing a Hugging Face directory shard by shard: interrupted, gone on with, refused, and read back."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime_opd.checkpoint.formats import hugging_face
from slime_opd.checkpoint.formats.hugging_face import INDEX, Group, untrained, write
from slime_opd.checkpoint.manifest import MANIFEST
from slime_opd.errors import CheckpointError
from slime_opd.model.families.deepseek_v3 import BlockScaledWeights

WEIGHTS = {f"model.layers.{n}.weight": torch.arange(16.0).reshape(4, 4) + n for n in range(5)}


@pytest.fixture
def origin(tmp_path):
    directory = tmp_path / "origin"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": {"bits": 8}}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / INDEX).write_text("{}")
    return directory


def groups(weights=WEIGHTS, *, fails_at: str | None = None, reads: list | None = None) -> list[Group]:
    def reading(name):
        def read():
            if name == fails_at:
                raise KeyboardInterrupt
            if reads is not None:
                reads.append(name)
            return {name: weights[name]}

        return read

    return [Group({name: (tuple(w.shape), w.dtype)}, reading(name)) for name, w in weights.items()]


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


def test_an_interrupted_conversion_goes_on_where_it_stopped(origin, tmp_path):
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
def test_another_conversions_remains_are_refused_and_replaced_by_force(origin, tmp_path, other):
    output = tmp_path / "output"
    with pytest.raises(KeyboardInterrupt):
        convert(origin, output, fails_at="model.layers.4.weight")
    with pytest.raises(CheckpointError, match="is not empty; choose another --output-dir or say --force"):
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


def test_a_shard_that_is_not_what_was_written_is_noticed(origin, tmp_path, monkeypatch):
    def bad_disk(state, path, metadata):
        save_file({name: weight + (name == "model.layers.2.weight") for name, weight in state.items()}, path)

    monkeypatch.setattr(hugging_face, "save_file", bad_disk)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.weight is not what was written; is the disk sound"):
        convert(origin, tmp_path / "output")
    assert not (tmp_path / "output" / "model-00002-of-00003.safetensors").exists()


def test_a_part_of_a_larger_tensor_is_written_alone(origin, tmp_path):
    whole = torch.arange(64.0).reshape(16, 4)
    parts = {"a": whole[:4], "b": whole[4:8].T}
    write(groups(parts), tmp_path / "output", origin, shard_bytes=10**6, overwrite=False, source="")
    assert all(written(tmp_path / "output")[name].equal(part) for name, part in parts.items())
    assert (tmp_path / "output" / "model.safetensors").stat().st_size < 400


OF_FOUR_LAYERS = SimpleNamespace(num_hidden_layers=4, tie_word_embeddings=False)


def test_weights_that_training_leaves_alone_are_copied(origin):
    save_file({**WEIGHTS, "model.mtp_layers.0.weight": torch.ones(2)}, origin / "model.safetensors")
    trained = groups({name: w for name, w in WEIGHTS.items() if "layers.4" not in name})
    copied = untrained(str(origin), trained, OF_FOUR_LAYERS)
    read = {name: w for group in copied for name, w in group.read().items()}
    assert sorted(read) == ["model.layers.4.weight", "model.mtp_layers.0.weight"]
    assert read["model.layers.4.weight"].equal(WEIGHTS["model.layers.4.weight"])
    in_fp8 = SimpleNamespace(**vars(OF_FOUR_LAYERS), quantization_config={"quant_method": "fp8"})
    assert untrained(str(origin), trained, in_fp8) == []


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({**WEIGHTS, "model.norm.weight": torch.ones(4)}, "the checkpoint lacks model.norm.weight"),
        (
            WEIGHTS | {"model.layers.0.weight": torch.ones(2, 4)},
            r"model.layers.0.weight is \[2, 4\] there and \[4, 4\]",
        ),
    ],
)
def test_an_origin_of_another_model_is_refused(origin, weights, expected):
    save_file(weights, origin / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"--origin-hf-dir .* is of another model: {expected}"):
        untrained(str(origin), groups(), SimpleNamespace(num_hidden_layers=9, tie_word_embeddings=False))


def test_a_tied_output_layer_of_the_origin_is_not_copied(origin):
    save_file({**WEIGHTS, "lm_head.weight": torch.ones(2)}, origin / "model.safetensors")
    assert untrained(str(origin), groups(), SimpleNamespace(num_hidden_layers=9, tie_word_embeddings=True)) == []


def test_half_a_download_is_named(origin):
    save_file(WEIGHTS, origin / "model.safetensors")
    (origin / "model.safetensors").write_bytes((origin / "model.safetensors").read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .*: is its download complete\?"):
        hugging_face.weights_dtype(origin)


def test_fp8_weights_are_read_times_the_scales_of_their_blocks(tmp_path):
    torch.manual_seed(0)
    weight, scales = torch.randn(200, 130).to(torch.float8_e4m3fn), torch.rand(2, 2) + 0.5
    plain = torch.randn(3).bfloat16()
    save_file({"w": weight, "w_scale_inv": scales, "plain": plain}, tmp_path / "model.safetensors")
    read = BlockScaledWeights(str(tmp_path)).load_some_hf_weight(["w", "plain"])
    expected = torch.stack([
        torch.stack([weight[i, j].float() * scales[i // 128, j // 128] for j in range(130)]) for i in range(200)
    ]).bfloat16()  # fmt: skip
    assert read["w"].dtype is torch.bfloat16 and read["w"].equal(expected)
    assert read["plain"].equal(plain)
    assert hugging_face.weights_dtype(tmp_path) is torch.bfloat16


def test_pickled_weights_are_not_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    for read in (hugging_face.weight_files, hugging_face.weights_dtype):
        with pytest.raises(
            CheckpointError, match=r"no \.safetensors file there; expected a Hugging Face model directory"
        ):
            read(tmp_path)


def test_a_checkpoint_that_names_a_function_is_not_read_by_the_conversion(tmp_path):
    import os
    import pickle

    from slime_opd.checkpoint.formats import torch_dist

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'made'}",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match=r"\.metadata names posix\.system, which no checkpoint needs"):
        torch_dist.Reader(tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_full_disk_is_a_sentence_and_the_same_conversion_continues(origin, tmp_path, monkeypatch):
    output, written_shards = tmp_path / "output", []

    def full(state, path, metadata):
        if written_shards:
            raise OSError(28, "No space left on device", str(path))
        written_shards.append(path)
        save_file(state, path, metadata)

    with monkeypatch.context() as patched:
        patched.setattr(hugging_face, "save_file", full)
        with pytest.raises(CheckpointError) as refusal:
            convert(origin, output)
    sentence = str(refusal.value)
    assert sentence.startswith(f"{output} was not written: No space left on device (all of it takes about 320 bytes, ")
    assert sentence.endswith(
        "are free); once this is mended, the same command continues with the first shard that is missing"
    )
    assert convert(origin, output) == ["model-00001-of-00003.safetensors"]


def test_another_failure_of_the_system_is_not_called_a_full_disk(origin, tmp_path, monkeypatch):
    def broken(state, path, metadata):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hugging_face, "save_file", broken)
    with pytest.raises(OSError, match="Input/output error"):
        convert(origin, tmp_path / "output")
