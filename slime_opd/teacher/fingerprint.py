"""A teacher's fingerprint: its log-probs of a few fixed sequences, and how far they vary by themselves.

The log-probs of one model and one sequence vary a little: with the batch that a request is computed in, with the prefix
cache, from replica to replica. They are read while the server is idle and while it is busy; the spread of these
readings is the normal variation. The distance of two readings is the largest, over the sequences, of the median over
tokens of |difference|: another model moves most tokens, while a mixture of experts under load may move a few far.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slime_opd.engine.client import EngineClient
from slime_opd.errors import TeacherError

# Several beginnings: a router that sends equal beginnings to one replica reaches more than one of them.
_NUM_SEQUENCES = 4
_LENGTH = 64
_SHORTEST = 16
_NUM_OTHERS = 24  # other requests beside the fixed ones while the server is busy
_NUM_READINGS = 2  # of each kind
_SAFETY = 4.0  # the readings are few: the normal variation may be larger than their spread
# Nats: the readings of a start may miss the variation of half precision. In bfloat16 (8 layers, on a CPU) single tokens
# moved by 0.14 with the batch while the median did not move.
_SMALLEST_TOLERANCE = 0.05
_LARGEST_SPREAD = 1.0

Reading = Sequence[np.ndarray]


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """A teacher's log-probs of fixed sequences.

    sequences: token ids. log_probs: of each sequence's tokens from `start` on, float32 [length - start].
    spread: largest distance of the readings from their median, in nats.
    """

    sequences: tuple[tuple[int, ...], ...]
    start: int
    log_probs: tuple[np.ndarray, ...]
    spread: float

    @property
    def noise(self) -> float:
        """Nats by which a single log-prob may move by itself; a larger move is very likely a change."""
        return max(1e-3, _SAFETY * self.spread)

    @property
    def tolerance(self) -> float:
        """Distance in nats beyond which a reading is taken for another teacher's."""
        return max(_SMALLEST_TOLERANCE, _SAFETY * self.spread)

    def to_json(self) -> dict[str, Any]:
        """The fingerprint as plain JSON values, for a checkpoint's run state."""
        return {
            "sequences": [list(sequence) for sequence in self.sequences],
            "start": self.start,
            "log_probs": [values.tolist() for values in self.log_probs],
            "spread": self.spread,
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Fingerprint:
        """The inverse of `to_json`."""
        log_probs = tuple(np.array(values, np.float32) for values in saved["log_probs"])
        return cls(tuple(map(tuple, saved["sequences"])), saved["start"], log_probs, saved["spread"])


def distance(a: Reading, b: Reading) -> float:
    """Largest, over the sequences, of the median over tokens of |a - b|, in nats."""
    return max(float(np.median(np.abs(x - y))) for x, y in zip(a, b, strict=True))


def fixed_sequences(ids: Sequence[int], length: int, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """`count` sequences of `length` of the `ids`, the same for the same ids and seed."""
    random = np.random.default_rng(seed)
    return [tuple(random.choice(ids, length).tolist()) for _ in range(count)]


async def read(client: EngineClient, sequences: Sequence[Sequence[int]], start: int) -> Reading:
    """The log-probs of the sequences' tokens from `start` on, requested at the same time."""
    return await asyncio.gather(*(client.score(sequence, start) for sequence in sequences))


async def take_fingerprint(client: EngineClient, ids: Sequence[int], max_length: int | None) -> Fingerprint | None:
    """The fingerprint of a server on sequences of `ids`; None for a server that takes too short inputs.

    Raises TeacherError where its readings differ so much that they cannot be of one model, EngineError where the server
    does not answer.
    """
    length = min(_LENGTH, max_length or _LENGTH)
    if length < _SHORTEST:
        return None
    sequences, start = fixed_sequences(ids, length, _NUM_SEQUENCES), length // 4
    readings: list[Reading] = []
    for _ in range(_NUM_READINGS):  # idle: one at a time, and the second time from the server's cache
        readings.append([await client.score(sequence, start) for sequence in sequences])
    for seed in range(_NUM_READINGS):  # busy, each time among others
        others = fixed_sequences(ids, length, _NUM_OTHERS, seed=seed + 1)
        lengths = np.linspace(2, length, len(others)).astype(int).tolist()
        cut = [other[:end] for other, end in zip(others, lengths, strict=True)]
        reading, _ = await asyncio.gather(read(client, sequences, start), read(client, cut, 1))
        readings.append(reading)
    middle = tuple(np.median(values, axis=0).astype(np.float32) for values in zip(*readings, strict=True))
    spread = max(distance(reading, middle) for reading in readings)
    if spread > _LARGEST_SPREAD:
        raise TeacherError(
            f"the teacher at {client.url} scores one sequence differently each time it is asked, by {spread:.2g} nats: "
            "do the servers behind this address serve different models?"
        )
    return Fingerprint(tuple(sequences), start, middle, spread)
