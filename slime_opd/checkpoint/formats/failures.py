"""Contexts around Megatron's reads and writes of torch_dist checkpoints, in which failures become CheckpointErrors."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from slime_opd.checkpoint import disk, safe_metadata
from slime_opd.checkpoint.formats.verification import gather
from slime_opd.checkpoint.location import Location
from slime_opd.checkpoint.whole import refusal
from slime_opd.errors import CheckpointError

# torch reads this at every load: pickles may then make tensors and plain values only, whatever the caller of torch.load
# passes.
_SAFE_LOADS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def reading(location: Location, flag: str) -> Iterator[None]:
    """Read a checkpoint inside, without running code that it contains; a failure is a CheckpointError on every rank."""
    before = os.environ.get(_SAFE_LOADS)
    os.environ[_SAFE_LOADS] = "1"
    try:
        with _quiet("torch.distributed.checkpoint"):
            safe_metadata.check_metadata(location.directory)
            _check_common(location.directory)
            yield
    except CheckpointError as error:
        raise CheckpointError(refusal(location, flag, [str(error)])) from error
    except (CheckpointException, CheckpointingException, OSError) as error:
        raise CheckpointError(refusal(location, flag, [reason(error)])) from error
    finally:
        if before is None:
            del os.environ[_SAFE_LOADS]
        else:
            os.environ[_SAFE_LOADS] = before


def _check_common(directory: Path) -> None:
    """Raise CheckpointError where common.pt, which every rank reads by itself, cannot be read."""
    try:
        torch.load(directory / "common.pt", map_location="cpu", weights_only=True)
    # A damaged archive may raise any exception.
    except Exception as error:
        raise CheckpointError(f"common.pt: {reason(error)}") from error


@contextmanager
def writing(partial_directory: Path, needed: int) -> Iterator[None]:
    """Inside, a checkpoint of `needed` bytes is written; a failure removes it and is a CheckpointError.

    Megatron raises a writer's failure on all ranks, with its reason on the first rank only; where one of the first
    rank's own files fails, only that rank ends, and with it the run.
    """
    root, name = partial_directory.parent, partial_directory.stem
    try:
        with _quiet("megatron.core.dist_checkpointing"):
            yield
    except CheckpointError:
        _remove(partial_directory)
        raise
    except (OSError, RuntimeError, CheckpointException) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        _remove(partial_directory)
        sentence = disk.not_written(root, name, needed, reason(error))
        if isinstance(error, CheckpointException):
            sentence = gather(sentence)[0]
        raise CheckpointError(sentence) from error


def _remove(directory: Path) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)


def reason(error: BaseException) -> str:
    """Why a checkpoint could not be read or written, in one line, from torch's and Megatron's long reports."""
    text = str(error)
    if match := re.search(r"(?i)unsupported (?:global: )?GLOBAL (\S+)", text):
        return f"it names {match[1]}, which no checkpoint needs: reading it could run code, so it is refused"
    if match := re.search(r"\[Errno \d+\] ([^:\n]+)", text):
        return match[1]
    if re.search(r"PytorchStreamWriter failed writing|unexpected pos", text):
        return "the file system does not take all of it"
    if re.search(r"Weights only load failed|PytorchStreamReader|failed finding central directory", text):
        return "its contents are damaged"
    last = next((line for line in reversed(text.splitlines()) if line.strip()), type(error).__name__)
    return f"it cannot be read ({last.strip()[:160]})"


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library from logging a failure that is raised as well."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
