"""Checks that the teacher's log-probs are of the tokens at their positions, and of the distribution it generates from.

Entry t of a score is the log-prob of token t given the tokens before it. With another token at t, entry t changes and
no entry before it: constant answers change nowhere, and answers that are shifted by a position change elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slime_opd.engine.client import EngineClient
from slime_opd.engine.protocol import SamplingParams
from slime_opd.errors import TeacherError
from slime_opd.teacher.fingerprint import Fingerprint, read

_NUM_POSITIONS = 8
_OFFSETS = 4  # entries before the changed token that are compared
_NUM_GENERATED = 16
# Nats. Decoding and scoring run different kernels, in half precision perhaps with a quantised cache.
_LARGEST_GAP = 0.5


async def check_causality(client: EngineClient, fingerprint: Fingerprint, ids: Sequence[int]) -> None:
    """Score one of the fixed sequences with one token changed, at several positions.

    Raises TeacherError with the problem that `causality_problem` returns.
    """
    sequence, start = fingerprint.sequences[0], fingerprint.start
    positions = np.linspace(start + _OFFSETS, len(sequence) - 1, _NUM_POSITIONS).astype(int).tolist()
    random = np.random.default_rng(0)
    changed = []
    for position in positions:
        another = int(random.choice([i for i in ids if i != sequence[position]]))
        changed.append((*sequence[:position], another, *sequence[position + 1 :]))
    moved = np.abs(np.stack(await read(client, changed, start)) - fingerprint.log_probs[0]) > fingerprint.noise
    if problem := causality_problem(moved, [position - start for position in positions]):
        raise TeacherError(f"the teacher at {client.url} {problem}")


def causality_problem(moved: np.ndarray, positions: Sequence[int]) -> str | None:
    """What is wrong with a teacher's scores, as the end of a sentence; None where nothing is.

    moved: bool [P, R], whether entry r changed when token `positions[p]` was changed. Single entries may move by
    themselves, so only changes at most positions count.
    """
    rows = np.arange(len(positions))
    if moved[rows, positions].mean() < 0.25:
        return (
            "does not score the tokens it is sent: with another token at a position, the log-prob at that position stays the same "
            "(its answers are constant, or shifted by a position)"
        )
    for offset in range(1, _OFFSETS + 1):
        if moved[rows, np.array(positions) - offset].mean() > 0.75:
            return (
                f"does not score each token by those before it: with another token at a position, the log-prob {offset} before it changes "
                "(its answers are shifted, or its model sees later tokens)"
            )
    return None


async def check_generation(client: EngineClient, fingerprint: Fingerprint, top_k: int) -> None:
    """Compare the log-probs of a greedy response as generated, as scored, and as the most likely of `top_k` tokens.

    Raises TeacherError where they are not of one distribution (all scores raised by a constant, or of another base).
    """
    prompt = fingerprint.sequences[0][: fingerprint.start]
    generation = await client.generate(prompt, SamplingParams(0.0, 1.0, -1, _NUM_GENERATED))
    tokens = (*prompt, *generation.token_ids)
    if not generation.token_ids:
        return
    scores = await client.score(tokens, len(prompt))
    _compare(client.url, scores, generation.log_probs, "as it generates the same tokens")
    if top_k:
        again, top = await client.score_top_k(tokens, len(prompt), top_k)
        _compare(client.url, again, top.log_probs.max(axis=1), "as its most likely tokens, which these are")


def _compare(url: str, scores: np.ndarray, expected: np.ndarray, source: str) -> None:
    gap = float(np.median(np.abs(scores - expected)))
    if gap > _LARGEST_GAP:
        raise TeacherError(
            f"the teacher at {url} scores its own greedy response with log-probs {gap:.2g} nats away from those it returns {source}: "
            "what it returns as scores are not its log-probs at temperature 1"
        )
