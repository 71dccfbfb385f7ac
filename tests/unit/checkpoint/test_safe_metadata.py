"""`.metadata` is read without running its code: what torch and Megatron write passes, anything else is refused."""

from __future__ import annotations

import collections
import os
import pickle
import random
import re

import pytest
import torch
from tiny_checkpoint import write_checkpoint
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from slime_opd.checkpoint.safe_metadata import check_metadata
from slime_opd.errors import CheckpointError


@pytest.fixture
def directory(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint")


class Calls:
    """An object whose unpickling calls a function."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def poison(directory, payload, protocol=4):
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.planner_data = payload
    (directory / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))


def test_the_minimal_size_of_every_file_is_read_without_torch(directory):
    sizes = {path.name: path.stat().st_size for path in directory.glob("*.distcp")}
    assert check_metadata(directory) == sizes and len(sizes) == 1


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.uint16]
)
@pytest.mark.parametrize("protocol", [4, 5])
def test_metadata_of_torch_and_megatron_passes(tmp_path, dtype, protocol):
    from megatron.core.dist_checkpointing.strategies.torch import MCoreMetadata
    from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
    from torch.distributed.checkpoint.planner import SavePlan

    tensor = TensorStorageMetadata(
        TensorProperties(dtype=dtype), torch.Size([4]), [ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))]
    )
    index = MetadataIndex("weight", torch.Size([0]), 0)
    metadata = Metadata({"weight": tensor, "rng/shard_0_1": BytesStorageMetadata()}, storage_data={index: _StorageInfo("__0_0.distcp", 8, 100)})  # fmt: skip
    metadata.planner_data = collections.OrderedDict(a=("b", 1), c={"d"})
    metadata.storage_meta = StorageMeta(tmp_path, "save", "load")
    metadata.mcore_data = {"weight": {"nd_reformulated_orig_global_shape": (4,)}}
    metadata.all_local_plans = [SavePlan([], storage_data=_StoragePrefix("__0_")), MCoreMetadata()]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))
    assert check_metadata(tmp_path) == {"__0_0.distcp": 108}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open('{}', 'w')",), "builtins.eval"),
        (exec, ("open('{}', 'w')",), "builtins.exec"),
        (pickle.loads, (b"",), "_pickle.loads"),
        (torch.load, ("{}",), "torch.serialization.load"),
        (__import__, ("os",), "builtins.__import__"),
    ],
)
def test_a_call_of_another_function_is_refused_by_name_and_not_made(
    directory, tmp_path, function, arguments, named, protocol
):
    made = tmp_path / "made"
    arguments = [argument.format(made) if isinstance(argument, str) else argument for argument in arguments]
    poison(directory, Calls(function, *arguments), protocol)
    # Earlier protocols have Python 2's names, and name what makes any object first.
    named = re.escape(named) if protocol == 4 else r"\S+"
    with pytest.raises(CheckpointError, match=rf"^\.metadata names {named}, which no checkpoint needs"):
        check_metadata(directory)
    assert not made.exists()


@pytest.mark.parametrize("target", [(Metadata, "__init__"), (dict, "__class__"), (torch.Size, "__base__")])
def test_getattr_is_refused_except_for_a_memory_format(directory, target):
    poison(directory, Calls(getattr, *target))
    with pytest.raises(CheckpointError, match="which no checkpoint needs"):
        check_metadata(directory)


def test_a_dotted_name_does_not_lead_out_of_an_allowed_module(directory):
    # Protocol 4 looks up "a.b" attribute by attribute: torch.os.system is os.system.
    payload = (
        pickle.PROTO + b"\x04" + pickle.SHORT_BINUNICODE + b"\x05torch" + pickle.SHORT_BINUNICODE + b"\x09os.system"
    )
    (directory / ".metadata").write_bytes(payload + pickle.STACK_GLOBAL + pickle.STOP)
    assert pickle.loads((directory / ".metadata").read_bytes()) is os.system
    with pytest.raises(CheckpointError, match=r"names torch\.os\.system, which no checkpoint needs"):
        check_metadata(directory)


@pytest.mark.parametrize("name", ["../other/__0_0.distcp", "/etc/passwd", "a/b"])
def test_a_file_outside_of_the_directory_is_refused(directory, name):
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = name
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="is outside of the checkpoint's directory"):
        check_metadata(directory)


def test_damage_of_any_kind_is_a_checkpoint_error_in_one_line(directory):
    whole, draw = (directory / ".metadata").read_bytes(), random.Random(0)
    for _ in range(400):
        content = bytearray(whole)
        kind, at = draw.choice(["flip", "cut", "zero", "noise"]), draw.randrange(len(whole))
        if kind == "flip":
            content[at] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del content[at:]
        else:
            content[at : at + 20] = bytes(20) if kind == "zero" else draw.randbytes(20)
        (directory / ".metadata").write_bytes(content)
        try:
            check_metadata(directory)
        except CheckpointError as error:
            assert "\n" not in str(error) and str(error).startswith(".metadata")


@pytest.mark.parametrize("value", [None, {}, 3, "text", []])
def test_a_pickle_of_another_object_is_refused(directory, value):
    (directory / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(CheckpointError, match=r"^\.metadata cannot be read"):
        check_metadata(directory)
