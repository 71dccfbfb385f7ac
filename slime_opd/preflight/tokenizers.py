"""Tokenizers: the student's is loaded, and a Megatron teacher's is compared with it, id by id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slime_opd.checkpoint import directory
from slime_opd.config import Config
from slime_opd.data.tokenizer import load_tokenizer
from slime_opd.errors import SlimeOPDError, TeacherMismatch
from slime_opd.preflight.findings import Findings, attempt
from slime_opd.teacher.tokenizers import compare_tokenizers


def inspect_tokenizer(config: Config, found: Findings) -> Any | None:
    """The student's tokenizer; None, with what that leaves unchecked, where it cannot be loaded."""
    path = config.model.hf_checkpoint
    if not (path and Path(path).is_dir()):
        found.unchecked.append("data and teacher: --hf-checkpoint, whose tokenizer they need, does not exist")
        return None
    tokenizer = attempt(found, lambda: load_tokenizer(path, "--hf-checkpoint"))
    if tokenizer is None:
        found.unchecked.append("data, reward and teacher: they need the tokenizer of --hf-checkpoint")
    return tokenizer


def inspect_teacher_tokenizer(config: Config, tokenizer: Any, found: Findings) -> None:
    """Compare the tokenizer of a Megatron teacher with the student's; `teacher.probe` does it for a server."""
    path = config.opd.opd_teacher_load
    if not config.teacher.is_in_trainer or path is None:
        return
    try:
        location = directory.find(path, config.opd.opd_teacher_ckpt_step)
    except SlimeOPDError:
        return  # reported with the checkpoints
    root = None if location is None else directory.tokenizer_dir(location)
    if root is None:
        found.unchecked.append(
            f"--opd-teacher-load {path}: its tokenizer, for there is none beside the checkpoint (tools/convert_hf_to_torch_dist.py keeps it)"
        )
        return

    def compare() -> str:
        teacher = load_tokenizer(root, "--opd-teacher-load")
        return f"--opd-teacher-load {path}: {compare_tokenizers(tokenizer, teacher, str(root))}; {_compare_ends(config, tokenizer, teacher, root)}"

    attempt(found, compare)


def _compare_ends(config: Config, student: Any, teacher: Any, root: Path) -> str:
    """A sentence about the ids that end a response. Raises TeacherMismatch where teacher and student share none."""
    from slime_opd.rollout.sampling import eos_token_ids

    ours, theirs = eos_token_ids(student, config.model.hf_checkpoint), eos_token_ids(teacher, str(root))
    if ours & theirs or not ours or not theirs:
        return f"both end at {', '.join(map(str, sorted(ours & theirs))) or '? (one of them names no end of sequence)'}"
    sentence = f"the teacher ends at {sorted(theirs)}, the student at {sorted(ours)}"
    if (root / "generation_config.json").is_file():
        raise TeacherMismatch(
            f"--opd-teacher-load {root}: {sentence}: the student would learn not to end; use a teacher with the same end-of-sequence token"
        )
    return sentence
