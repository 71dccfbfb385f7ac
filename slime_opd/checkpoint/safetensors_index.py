"""`model.safetensors.index.json`: the file of each weight of a Hugging Face directory with several weight files."""

from __future__ import annotations

import json
from pathlib import Path

from slime_opd.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def read_index(directory: Path) -> dict[str, str] | None:
    """File names by weight; None where the directory has no index. Raises CheckpointError where it is damaged."""
    index = directory / INDEX
    if not index.exists():
        return None
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        raise CheckpointError(f"{index} is not JSON") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of tensors to files")
    if not all(isinstance(file, str) and Path(file).name == file and "\0" not in file for file in weight_map.values()):
        raise CheckpointError(f"{index}: its weight_map names something that is not a file of this directory")
    return weight_map
