"""Before the first rollout: is the teacher there, and does it speak the student's language?

Everything is asked of the server itself; its disk may be out of reach. Its vocabulary size comes from
a request that SGLang refuses before it touches the model: *an input id past the vocabulary would not be
refused; it ends the server* (sglang 0.5.9). For the same reason nothing is scored before the size is known
to be the student's. Its tokenizer is compared by the text that the server decodes a spread of ids
to, and its end-of-sequence ids by making it generate each of the student's.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slime_opd.engine import protocol
from slime_opd.engine.client import EngineClient
from slime_opd.errors import DataError, EngineError, TeacherError, TeacherMismatch

_IDS_COMPARED = 256
_BEYOND_ANY_VOCABULARY = 1 << 30
# More than any logit: the id it is added to is the one that is generated.
_CERTAIN = 1e6


@dataclass(frozen=True)
class ProbeReport:
    """What was found out about a teacher; `unchecked` says what could not be, and why."""

    model_path: str
    vocabulary_size: int | None
    checked_tokens: int
    eos_ids: tuple[int, ...]
    unchecked: tuple[str, ...]

    def __str__(self) -> str:
        size = "?" if self.vocabulary_size is None else f"{self.vocabulary_size:,}"
        found = f"teacher {self.model_path}: vocabulary {size}, {self.checked_tokens} tokens compared, ends at {', '.join(map(str, self.eos_ids)) or '?'}"
        return "; ".join([found, *(f"not checked: {gap}" for gap in self.unchecked)])


async def probe(client: EngineClient, tokenizer: Any, student_checkpoint: str | Path, top_k: int = 0) -> ProbeReport:
    """`probe_teacher` against the student in the Hugging Face directory `student_checkpoint`."""
    vocabulary_size, eos_ids = student_facts(Path(student_checkpoint))
    return await probe_teacher(client, tokenizer, vocabulary_size, eos_ids, top_k)


async def probe_teacher(
    client: EngineClient, tokenizer: Any, vocabulary_size: int, eos_ids: Collection[int], top_k: int = 0
) -> ProbeReport:
    """Ask the teacher's server whether it can teach a student of this tokenizer, vocabulary size and these end-of-sequence ids.

    With `top_k` it must also tell that many of its most likely tokens.

    Raises TeacherError where it does not answer or returns no scores, TeacherMismatch
    (with both values) where it shares less than the student needs.
    """
    try:
        info = await client.model_info()
        unchecked: list[str] = []
        size = info.vocab_size or await _vocabulary_size(client)
        if size is None:
            unchecked.append("vocabulary size (the server does not tell)")
        elif size != vocabulary_size:
            raise TeacherMismatch(
                f"the teacher at {client.url} ({info.model_path}) has a vocabulary of {size} tokens, the student of {vocabulary_size}: "
                "their log-probs cannot be compared; use a teacher of the student's model family"
            )
        ids = spread_of_ids(tokenizer, vocabulary_size, _limit(info))
        texts = await _decoded_by_teacher(client, ids) or _decoded_from_disk(info, ids)
        checked = 0 if texts is None else compare_texts(ids, texts, decoded(tokenizer, ids), info.tokenizer_path)
        if texts is None:
            unchecked.append(
                f"tokenizer (the server was started with --skip-tokenizer-init, and {info.tokenizer_path} is not readable here)"
            )
        if top_k:
            await client.score_top_k(ids[:2], 1, top_k)
        ending = await _ending_ids(client, eos_ids)
    except EngineError as error:
        raise TeacherError(f"the teacher at --rm-url does not score: {error}") from error
    if eos_ids and not ending:
        raise TeacherMismatch(
            f"the teacher at {client.url} ({info.model_path}) does not end at the student's end-of-sequence ids {sorted(eos_ids)}: "
            "the student would learn not to end; use a teacher with the same end-of-sequence token"
        )
    if not eos_ids:
        unchecked.append("end-of-sequence (the student's config names none)")
    return ProbeReport(info.model_path, size, checked, ending, tuple(unchecked))


def student_facts(checkpoint: Path) -> tuple[int, set[int]]:
    """Vocabulary size and end-of-sequence ids of a Hugging Face directory. Raises DataError without the former."""
    config = _json_file(checkpoint / "config.json")
    text_config = config.get("text_config", config)
    if not isinstance(text_config.get("vocab_size"), int):
        raise DataError(
            f"{checkpoint / 'config.json'}: no vocab_size; is it the Hugging Face directory of a language model?"
        )
    eos_ids: set[int] = set()
    for source in (text_config, config, _json_file(checkpoint / "generation_config.json")):
        named = source.get("eos_token_id")
        eos_ids.update([named] if isinstance(named, int) else named or [])
    return text_config["vocab_size"], eos_ids


def spread_of_ids(tokenizer: Any, vocabulary_size: int, limit: int) -> list[int]:
    """At most `limit` ids from the whole vocabulary: its special tokens first, then ids at even distances.

    The last id of the model's vocabulary is left out: SGLang echoes it as 0.
    """
    last = min(len(tokenizer), vocabulary_size - 1) - 1
    special = sorted(i for i in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} if i <= last)
    chosen = {*special[: limit // 2], last}
    even = np.linspace(0, last, num=min(limit, last + 1) - len(chosen)).round().astype(int).tolist()
    return sorted(chosen | set(even))


def decoded(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each id by itself, decoded as SGLang does it."""
    return tokenizer.batch_decode([[i] for i in ids])


def compare_texts(
    ids: Sequence[int], teacher: Sequence[str], student: Sequence[str], teacher_tokenizer: str | None
) -> int:
    """Number of ids compared. Raises TeacherMismatch where an id means one text to the teacher and another to the student."""
    differing = [(i, theirs, ours) for i, theirs, ours in zip(ids, teacher, student, strict=True) if theirs != ours]
    if differing:
        examples = "; ".join(
            f"id {i} is {theirs!r} to the teacher and {ours!r} to the student" for i, theirs, ours in differing[:3]
        )
        raise TeacherMismatch(
            f"the teacher's tokenizer ({teacher_tokenizer}) is not the student's: {len(differing)} of {len(ids)} ids compared differ: {examples}"
        )
    return len(ids)


async def _vocabulary_size(client: EngineClient) -> int | None:
    """From SGLang's refusal of a bias on an impossible id: "logit_bias must has keys in [0, 151935], got …"."""
    sampling = {"max_new_tokens": 0, "logit_bias": {str(_BEYOND_ANY_VOCABULARY): 0.0}}
    try:
        await client.post_generate({"input_ids": [0], "sampling_params": sampling})
    except EngineError as refusal:
        if (found := re.search(r"logit_bias.*?\[0, (\d+)\]", str(refusal))) is not None:
            return int(found[1]) + 1
        if "HTTP 4" not in str(refusal):
            raise
    return None


async def _decoded_by_teacher(client: EngineClient, ids: Sequence[int]) -> list[str] | None:
    """The text of each id by the teacher's tokenizer, None where it has none; checks on the way that the ids get finite scores."""
    payload = {**protocol.score_payload(ids, 1), "return_text_in_logprobs": True}
    answer = await client.post_generate(payload)
    protocol.parse_scores(answer, ids, 1)
    texts = [row[2] for row in answer["meta_info"]["input_token_logprobs"]]
    return None if any(text is None for text in texts) else texts


def _decoded_from_disk(info: protocol.ModelInfo, ids: Sequence[int]) -> list[str] | None:
    """The same, by the teacher's tokenizer files, None where they are not on this machine."""
    if info.tokenizer_path is None or not Path(info.tokenizer_path).is_dir():
        return None
    from transformers import AutoTokenizer

    return decoded(AutoTokenizer.from_pretrained(info.tokenizer_path), ids)


async def _ending_ids(client: EngineClient, ids: Collection[int]) -> tuple[int, ...]:
    """Those of `ids` after which the teacher's server ends a response."""

    async def ends_at(token_id: int) -> bool:
        sampling = {"temperature": 0.0, "max_new_tokens": 2, "logit_bias": {str(token_id): _CERTAIN}}
        answer = await client.post_generate({"input_ids": [0], "sampling_params": sampling})
        return (answer["meta_info"].get("finish_reason") or {}).get("type") == "stop"

    ordered = sorted(ids)
    ends = await asyncio.gather(*(ends_at(i) for i in ordered))
    return tuple(i for i, end in zip(ordered, ends, strict=True) if end)


def _limit(info: protocol.ModelInfo) -> int:
    return min(_IDS_COMPARED, info.max_input_length or _IDS_COMPARED)


def _json_file(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
