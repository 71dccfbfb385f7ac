"""Reading the weights of a Hugging Face directory: by the index or by the files, fp8 with scales, never a pickle."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from slime_opd.checkpoint.formats.hf_reader import WeightReader, weight_files, weights_dtype
from slime_opd.checkpoint.safetensors_index import INDEX
from slime_opd.errors import CheckpointError

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4), "c": torch.zeros(1)}


def test_weights_of_several_files_are_found_with_and_without_an_index(tmp_path):
    for number, name in enumerate(WEIGHTS):
        save_file({name: WEIGHTS[name]}, tmp_path / f"model-{number}.safetensors")
    for _ in range(2):
        reader = WeightReader(tmp_path)
        assert reader.names == set(WEIGHTS)
        assert reader.shapes() == {name: tuple(weight.shape) for name, weight in WEIGHTS.items()}
        assert all(weight.equal(WEIGHTS[name]) for name, weight in reader.read_several(["c", "a"]).items())
        index = {name: f"model-{number}.safetensors" for number, name in enumerate(WEIGHTS)}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))


def test_a_file_that_the_index_does_not_name_is_not_read(tmp_path):
    save_file({"a": WEIGHTS["a"]}, tmp_path / "model-1.safetensors")
    save_file({"layers.0.a": WEIGHTS["b"]}, tmp_path / "consolidated.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert WeightReader(tmp_path).names == {"a"}


def test_a_weight_or_a_file_that_is_missing_is_named(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    reader = WeightReader(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no weight b: is its download complete\?"):
        reader.read("b")
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors cannot be read .*: is its download complete"):
        reader.read("a")


def test_an_incomplete_download_is_refused_by_name(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .*: is its download complete\?"):
        weights_dtype(tmp_path)


def test_fp8_weights_are_read_times_the_scales_of_their_blocks(tmp_path):
    torch.manual_seed(0)
    weight, scales = torch.randn(200, 130).to(torch.float8_e4m3fn), torch.rand(2, 2) + 0.5
    plain = torch.randn(3).bfloat16()
    save_file({"w": weight, "w_scale_inv": scales, "plain": plain}, tmp_path / "model.safetensors")
    read = WeightReader(tmp_path).read_several(["w", "plain"])
    expected = torch.stack([
        torch.stack([weight[i, j].float() * scales[i // 128, j // 128] for j in range(130)]) for i in range(200)
    ]).bfloat16()  # fmt: skip
    assert read["w"].dtype is torch.bfloat16 and read["w"].equal(expected)
    assert read["plain"].equal(plain)
    assert weights_dtype(tmp_path) is torch.bfloat16


def test_pickled_weights_are_not_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    for read in (weight_files, weights_dtype, WeightReader):
        with pytest.raises(
            CheckpointError, match=r"no \.safetensors file there; expected a Hugging Face model directory"
        ):
            read(tmp_path)
