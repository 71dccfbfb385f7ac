"""The checks of a teacher's server before the first rollout: it answers, shares the student's vocabulary, and scores.

All facts come from the server itself, whose disk may be out of reach. Its vocabulary size comes from a request that
SGLang refuses before it touches the model: *an input id past the vocabulary would not be refused; it ends the server*
(sglang 0.5.9). For the same reason nothing is scored before the size is known to be the student's. Its tokenizer is
compared by the text to which the server decodes ids spread over the vocabulary, and its end-of-sequence ids by making
it generate each of the student's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_opd.data.tokenizer import load_tokenizer
from slime_opd.engine import protocol
from slime_opd.engine.client import EngineClient
from slime_opd.errors import ConfigError, EngineError, TeacherError, TeacherMismatch
from slime_opd.teacher.causality import check_causality, check_generation
from slime_opd.teacher.facts import request_ending_ids, request_vocabulary_size
from slime_opd.teacher.fingerprint import Fingerprint, take_fingerprint
from slime_opd.teacher.tokenizers import compare_texts, decoded, special_ids, spread_of_ids

_IDS_COMPARED = 256


@dataclass(frozen=True)
class ProbeReport:
    """The facts about a teacher that passed the checks. unchecked: what could not be checked, and why."""

    url: str
    model_path: str
    vocabulary_size: int | None
    checked_tokens: int
    eos_ids: tuple[int, ...]
    fingerprint: Fingerprint | None
    unchecked: tuple[str, ...]

    def __str__(self) -> str:
        facts = [f"teacher {self.model_path} at {self.url}"]
        if self.vocabulary_size is not None:
            facts.append(f"{self.vocabulary_size:,} tokens in its vocabulary")
        if self.checked_tokens:
            facts.append(f"{self.checked_tokens} of them compared")
        if self.eos_ids:
            facts.append(f"ends at {', '.join(map(str, self.eos_ids))}")
        if self.fingerprint is not None:
            facts.append(f"log-probs repeat to {self.fingerprint.spread:.1g} nats")
        return "; ".join([", ".join(facts), *(f"not checked: {gap}" for gap in self.unchecked)])


async def probe_teacher(
    client: EngineClient, tokenizer: Any, vocabulary_size: int, eos_ids: Collection[int], top_k: int = 0
) -> ProbeReport:
    """Check that the server can teach a student with this tokenizer, vocabulary size and these end-of-sequence ids.

    `top_k`: how many of its most likely tokens it must return; 0: none. Raises TeacherError where the server does not
    answer or its scores cannot be a model's log-probs of the tokens sent, and TeacherMismatch (with both values) where
    vocabulary, tokenizer or end-of-sequence differ.
    """
    unchecked: list[str] = []
    try:
        info = await client.model_info()
        size = info.vocab_size or await request_vocabulary_size(client)
        if size is None:
            unchecked.append("vocabulary size (the server does not return it)")
        elif size != vocabulary_size:
            raise TeacherMismatch(
                f"the teacher at {client.url} ({info.model_path}) has a vocabulary of {size} tokens, the student of {vocabulary_size}: "
                "their log-probs cannot be compared; use a teacher of the student's model family"
            )
        ids = spread_of_ids(tokenizer, vocabulary_size, min(_IDS_COMPARED, info.max_input_length or _IDS_COMPARED))
        texts = await _decoded_by_teacher(client, ids) or _decoded_from_disk(info, ids)
        checked = 0 if texts is None else compare_texts(ids, texts, decoded(tokenizer, ids), info.tokenizer_path)
        if texts is None:
            unchecked.append(
                f"tokenizer (the server was started with --skip-tokenizer-init, and {info.tokenizer_path} is not readable here)"
            )
        ending = await request_ending_ids(client, eos_ids)
        special = special_ids(tokenizer) | set(eos_ids)
        fingerprint = await _check_scores(client, [i for i in ids if i not in special] or ids, info, top_k)
        if fingerprint is None:
            unchecked.append(f"log-probs (the server takes {info.max_input_length} tokens only)")
    except EngineError as error:
        raise TeacherError(f"the teacher at --rm-url does not score: {error}") from error
    if eos_ids and not ending:
        raise TeacherMismatch(
            f"the teacher at {client.url} ({info.model_path}) does not end at the student's end-of-sequence ids {sorted(eos_ids)}: "
            "the student would learn not to end; use a teacher with the same end-of-sequence token"
        )
    if not eos_ids:
        unchecked.append("end-of-sequence (the student's config names none)")
    return ProbeReport(client.url, info.model_path, size, checked, ending, fingerprint, tuple(unchecked))


async def _check_scores(
    client: EngineClient, ids: Sequence[int], info: protocol.ModelInfo, top_k: int
) -> Fingerprint | None:
    """The teacher's fingerprint; None for a server with too short an input limit.

    Raises TeacherError where its scores are not log-probs of the tokens that were sent.
    """
    fingerprint = await take_fingerprint(client, ids, info.max_input_length)
    if fingerprint is not None:
        await check_causality(client, fingerprint, ids)
        await check_generation(client, fingerprint, top_k)
    elif top_k:
        await client.score_top_k(ids[:2], 1, top_k)
    return fingerprint


async def _decoded_by_teacher(client: EngineClient, ids: Sequence[int]) -> list[str] | None:
    """The text of each id by the server's tokenizer, None without one. Raises EngineError for a wrong answer."""
    answer = await client.post_generate({**protocol.score_payload(ids, 1), "return_text_in_logprobs": True})
    protocol.parse_scores(answer, ids, 1, client.vocabulary_size)
    texts = [row[2] if len(row) > 2 else None for row in protocol.meta_info(answer)["input_token_logprobs"]]
    return texts if all(isinstance(text, str) for text in texts) else None


def _decoded_from_disk(info: protocol.ModelInfo, ids: Sequence[int]) -> list[str] | None:
    """The text of each id by the teacher's tokenizer files; None where they are not on this machine."""
    if info.tokenizer_path is None or not Path(info.tokenizer_path).is_dir():
        return None
    try:
        return decoded(load_tokenizer(info.tokenizer_path, "the teacher's tokenizer"), ids)
    except ConfigError:
        return None  # reported as not checked
