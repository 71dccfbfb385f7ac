"""A torch_dist checkpoint written as a Hugging Face directory: for the conversion tool, and during training for --save-hf."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from slime_opd.checkpoint.formats import conversion, hugging_face, torch_dist
from slime_opd.checkpoint.manifest import MANIFEST

SHARD_BYTES = 5 * 1024**3


def write(
    directory: str | Path, output: str | Path, origin: str, *, shard_bytes: int = SHARD_BYTES, overwrite: bool = False
) -> list[str]:
    """Write the checkpoint in `directory` to `output`, with tokenizer, config and untrained weights of `origin`.

    Read from the files, shard by shard: needs no GPU and no other rank. Where the same conversion was interrupted it
    continues; returns the shards that were there. Raises CheckpointError as `hugging_face.write` does.
    """
    directory = Path(directory)
    trained, hf_config = conversion.to_hugging_face(torch_dist.Reader(directory), origin)
    return hugging_face.write(
        [*trained, *hugging_face.untrained(origin, trained, hf_config)],
        output,
        origin,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        source=str(directory.resolve()),
    )


def replace_directory(path: str | Path, make: Callable[[Path], object]) -> Path:
    """Let `make` fill PATH.partial, then give it the name PATH, which so exists only when whole.

    A step that is done again writes its directory again: an equal one replaces PATH, another leaves PATH as PATH.aside_N.
    """
    final = Path(path)
    partial = final.with_name(f"{final.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    # An interrupted one may be of a step that was since done again.
    shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    if final.exists():
        manifests = [(directory / MANIFEST) for directory in (final, partial)]
        if manifests[0].is_file() and manifests[0].read_bytes() == manifests[1].read_bytes():
            shutil.rmtree(partial)
            return final
        number = 1
        while (aside := final.with_name(f"{final.name}.aside_{number}")).exists():
            number += 1
        final.rename(aside)
    return partial.rename(final)
