"""Reads `.metadata` of a torch_dist checkpoint without torch, and without running code that it may contain.

`.metadata` is a pickle, and a pickle may call any function. It is read here with stand-ins for the few classes that
torch.distributed.checkpoint and Megatron write into it; a file that names anything else is refused. A file that passes
is safe for torch to load: the same bytes make the same calls there.
"""

from __future__ import annotations

import gc
import io
import pickle
from pathlib import Path
from typing import Any

from slime_opd.errors import CheckpointError

_DTYPES = """float32 float64 float16 bfloat16 complex32 complex64 complex128 uint8 uint16 uint32 uint64 int8 int16 int32
int64 bool float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2"""
_PATHS = frozenset({"Path", "PosixPath", "PurePath", "PurePosixPath"})
_ENUM = ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")
# Classes and functions that `.metadata` may name: all of them only hold values.
ALLOWED: dict[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset({
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    }),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
    "torch.distributed.checkpoint.planner": frozenset({"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"}),
    "torch.distributed._shard.sharded_tensor.metadata": frozenset({"TensorProperties", "MEM_FORMAT_ENCODING"}),
    "megatron.core.dist_checkpointing.strategies.torch": frozenset({"MCoreMetadata", "MCoreSavePlan"}),
    "torch": frozenset({"Size", *_DTYPES.split()}),
    "torch.serialization": frozenset({"_get_layout"}),
    "collections": frozenset({"OrderedDict"}),
    "builtins": frozenset({"set", "frozenset"}),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}  # fmt: skip


class _StandIn:
    """An object of an allowed class: its arguments and attributes, and no behaviour."""

    def __new__(cls, *arguments: Any, **_: Any) -> _StandIn:
        instance = super().__new__(cls)
        instance.__dict__["arguments"] = arguments
        return instance

    def __init__(self, *_: Any, **__: Any) -> None:
        """Accept any arguments; `__new__` has stored them."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore an item of an OrderedDict."""

    def update(self, *_: Any) -> None:
        """Ignore the items of a set."""

    add = update


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, path: Path) -> None:
        super().__init__(stream)
        self._path = path
        self._classes: dict[tuple[str, str], type[_StandIn]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return self._enum_member
        if name not in ALLOWED.get(module, ()):
            raise CheckpointError(
                f"{self._path.name} names {module}.{name}, which no checkpoint needs: reading it could run code, so it is refused"
            )
        return self._classes.setdefault((module, name), type(name, (_StandIn,), {}))

    def _enum_member(self, owner: Any, name: Any) -> Any:
        """A member of the one allowed enum, as some releases of Python 3.11 write it; other calls are refused."""
        allowed = self._classes.get(_ENUM)
        is_member = isinstance(name, str) and name.startswith("TORCH_")
        if allowed is None or owner is not allowed or not is_member:
            raise CheckpointError(f"{self._path.name} calls getattr, which no checkpoint needs: it is refused")
        return allowed(name)


def check_metadata(directory: Path) -> dict[str, int]:
    """Read a checkpoint's `.metadata` safely; returns the minimal size in bytes of each file that it refers to.

    Raises CheckpointError where it cannot be read, names a class that is not allowed, or a file outside of the
    directory.
    """
    path = directory / ".metadata"
    # A large model's has a million small objects, which the garbage collector would scan again and again.
    collects = gc.isenabled()
    gc.disable()
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes()), path).load()
        stored = metadata.storage_data.values()
        extents = [(str(info.relative_path), int(info.offset) + int(info.length)) for info in stored]
        # torch reads it when it loads the checkpoint.
        metadata.state_dict_metadata.items()
    except CheckpointError:
        raise
    # A damaged pickle may raise any exception: those of every function that it calls with wrong arguments.
    except Exception as error:
        raise CheckpointError(
            f".metadata cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:80]})"
        ) from None
    finally:
        if collects:
            gc.enable()
    sizes: dict[str, int] = {}
    for name, end in extents:
        if Path(name).name != name:
            raise CheckpointError(
                f".metadata refers to {name}, which is outside of the checkpoint's directory: it is refused"
            )
        sizes[name] = max(sizes.get(name, 0), end)
    if not sizes:
        raise CheckpointError(".metadata refers to no file: the checkpoint holds no tensors")
    return sizes
