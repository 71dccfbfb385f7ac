"""Tokenizers: the student's is loaded, and a Megatron teacher's is compared with it, id by id."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slime_opd.checkpoint import directory
from slime_opd.config import Config
from slime_opd.errors import ConfigError, SlimeOPDError, TeacherMismatch
from slime_opd.preflight.findings import Findings, attempt, one_line

_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")


def load_tokenizer(path: str | Path, option: str) -> Any:
    """The tokenizer in the Hugging Face directory that `option` names. Raises ConfigError, in one sentence, where there is none."""
    root = Path(path)
    if not any(file for pattern in _VOCABULARY_FILES for file in root.glob(pattern)):
        raise ConfigError(
            f"{option} {root}: found no tokenizer, expected tokenizer.json and tokenizer_config.json; copy them from the model's original directory"
        )
    for name in _JSON_FILES:
        _check_json(root / name, option)
    with _quiet():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=False)
            size = len(tokenizer)
        except (KeyboardInterrupt, SystemExit):
            raise
        except (
            BaseException
        ) as error:  # anything from transformers; and panics of tokenizers' Rust code are no Exception
            raise ConfigError(f"{option} {root}: its tokenizer cannot be loaded: {one_line(error)}") from error
    if size == 0:
        raise ConfigError(f"{option} {root}: its tokenizer has no tokens; are its files complete?")
    return tokenizer


def look_at_tokenizer(config: Config, found: Findings) -> Any | None:
    """The student's tokenizer; None, with what that leaves unchecked, where it cannot be loaded."""
    path = config.model.hf_checkpoint
    if not (path and Path(path).is_dir()):
        found.unchecked.append("data and teacher: --hf-checkpoint, whose tokenizer they need, does not exist")
        return None
    tokenizer = attempt(found, lambda: load_tokenizer(path, "--hf-checkpoint"))
    if tokenizer is None:
        found.unchecked.append("data, reward and teacher: they need the tokenizer of --hf-checkpoint")
    return tokenizer


def look_at_teacher_tokenizer(config: Config, tokenizer: Any, found: Findings) -> None:
    """Compare the tokenizer of a Megatron teacher, from its directory. An SGLang teacher's server is asked by `teacher.probe`."""
    path = config.opd.opd_teacher_load
    if not config.has_megatron_teacher or path is None:
        return
    try:
        location = directory.find(path, config.opd.opd_teacher_ckpt_step)
    except SlimeOPDError:
        return  # reported where checkpoints are looked at
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


def compare_tokenizers(student: Any, teacher: Any, teacher_name: str) -> str:
    """A sentence about two tokenizers that agree on every id that both have.

    Raises TeacherMismatch with the first ids that mean different texts.
    """
    ours, theirs = _tokens_by_id(student), _tokens_by_id(teacher)
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        raise TeacherMismatch(f"the teacher's tokenizer ({teacher_name}) shares no id with the student's")
    if any(ours[i] != theirs[i] for i in shared):
        from slime_opd.teacher.probe import compare_texts, decoded

        # Tokenizers of different kinds write one token differently (▁the, Ġthe); its text decides.
        compare_texts(shared, decoded(teacher, shared), decoded(student, shared), teacher_name)
    sentence = f"all {len(shared)} ids that its tokenizer shares with the student's are the same tokens"
    alone = [
        f"{len(own)} only the {who}'s, from {min(own)}"
        for who, own in (("student", ours.keys() - theirs.keys()), ("teacher", theirs.keys() - ours.keys()))
        if own
    ]
    return f"{sentence} ({', '.join(alone)})" if alone else sentence


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


def _tokens_by_id(tokenizer: Any) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _check_json(file: Path, option: str) -> None:
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{option}: {file} is not valid JSON ({one_line(error)}); is it complete?") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{option}: {file} is no JSON object; is it of a tokenizer?")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of transformers, which are about uses that are not made of the tokenizer here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
