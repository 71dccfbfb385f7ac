"""A header is read without its tensors, and a file that is not whole is refused in a sentence."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slime_opd.errors import CheckpointError
from slime_opd.preflight.safetensors_header import TensorInfo, read_header


def written(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_names_dtypes_and_shapes_are_those_that_were_saved(tmp_path):
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "none": torch.zeros(0, 5)}
    save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
    assert read_header(tmp_path / "file") == {
        "a": TensorInfo("F32", (2, 3)),
        "b": TensorInfo("BF16", (4,)),
        "none": TensorInfo("F32", (0, 5)),
    }


@pytest.mark.parametrize(
    "dtype", ["float64", "float16", "int8", "uint8", "int64", "bool", "float8_e4m3fn", "complex64"]
)
def test_every_dtype_that_torch_saves_is_known(tmp_path, dtype):
    save_file({"a": torch.zeros(3, dtype=getattr(torch, dtype))}, tmp_path / "file")
    assert read_header(tmp_path / "file")["a"].shape == (3,)


@pytest.mark.parametrize(
    ("header", "data", "length", "sentence"),
    [
        (b"", b"", 0, "does not start with a header"),
        (b"{}", b"", 2**62, "does not start with a header"),
        (b"{}", b"", 100, "its header has 100 bytes, and only 2 are there"),
        (b"{]", b"", None, "its header is not JSON"),
        (b"[1]", b"", None, "its header is not a JSON object"),
        (b"[" * 100_000, b"", None, "its header is not JSON"),
        (b'{"a": 1, "a": 1}', b"", None, "its header is not JSON"),
        ({"a": 1}, b"", None, "a has no dtype, shape and data_offsets"),
        ({"a": entry(shape=(-2,))}, bytes(8), None, "a has a shape or an offset that is not a number"),
        ({"a": entry(shape=(True, 2))}, bytes(8), None, "a has a shape or an offset that is not a number"),
        ({"a": entry(dtype="F7")}, bytes(8), None, "a is of the unknown dtype F7"),
        ({"a": entry(shape=(3,))}, bytes(8), None, "a has 8 bytes, which are not a F32 tensor of shape [3]"),
        ({"a": entry()}, bytes(7), None, "is truncated: its header describes 8 bytes of tensors, and 7 are there"),
        ({"a": entry()}, bytes(9), None, "1 bytes follow its last tensor"),
        ({"a": entry(), "b": entry()}, bytes(8), None, "b starts at byte 0 of the data, expected 8"),
        ({"a": entry(offsets=(8, 16))}, bytes(16), None, "a starts at byte 8 of the data, expected 0"),
        ({"__metadata__": {"a": 1}}, b"", None, "its __metadata__ is not an object of strings"),
        ({"a\n\x1b[31m": 1}, b"", None, "a\\n\\x1b[31m has no dtype"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(tmp_path, header, data, length, sentence):
    file = written(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError) as raised:
        read_header(file)
    assert str(file) in str(raised.value) and sentence in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(SafetensorError):  # and the library refuses it as well
        safe_open(file, framework="pt")


def test_an_empty_file_and_one_that_is_not_there_are_sentences(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(CheckpointError, match="empty is not a whole safetensors file: it has 0 bytes"):
        read_header(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="gone cannot be read: No such file"):
        read_header(tmp_path / "gone")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_file_is_refused_or_is_one_that_the_library_opens(tmp_path, data):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "whole")
    content = bytearray((tmp_path / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.sampled_from([*b'0123456789{}[]",:a', 0, 255]))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    file = tmp_path / "mutated"
    file.write_bytes(content[:cut])
    try:
        found = read_header(file)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    with safe_open(file, framework="pt") as weights:
        assert {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()} == {  # noqa: SIM118
            name: info.shape for name, info in found.items()
        }
