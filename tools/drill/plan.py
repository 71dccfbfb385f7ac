"""The random plan of a drill: every kind of kill equally often, over the stacks and phases to which it applies."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from drill.kinds import ALL_STACKS, Kind, Phase


@dataclass(frozen=True)
class Trial:
    """One planned kill.

    `after`: number of steps before it. `fraction` (0 to 1): its moment within the phase; also selects among several
    processes of the same role. `tries`: number of runs in which it could not be done.
    """

    number: int
    kind: Kind
    stack: str
    phase: Phase
    after: int
    fraction: float
    tries: int = 0

    def again(self) -> Trial:
        """The same kill at another moment."""
        return replace(self, tries=self.tries + 1, after=1, fraction=(self.fraction + 0.37) % 1)


def plan(kills: int, seed: int, kinds: Sequence[Kind]) -> list[Trial]:
    """`kills` trials. The same arguments give the same trials."""
    generator = random.Random(seed)
    order = generator.sample(kinds, len(kinds))
    settings = {kind.name: itertools.cycle(_settings(kind, generator)) for kind in order}
    trials = []
    for number in range(1, kills + 1):
        kind = order[(number - 1) % len(order)]
        stack, phase = next(settings[kind.name])
        trials.append(Trial(number, kind, stack, phase, generator.randint(1, 3), generator.random()))
    return trials


def batches(trials: Sequence[Trial], size: int = 5) -> list[tuple[str, list[Trial]]]:
    """The kills of each run: a stack, and up to `size` of its trials, in order."""
    runs = []
    for stack in ALL_STACKS:
        own = [trial for trial in trials if trial.stack == stack]
        runs += [(stack, own[start : start + size]) for start in range(0, len(own), size)]
    return runs


def _settings(kind: Kind, generator: random.Random) -> list[tuple[str, Phase]]:
    """The pairs of stack and phase to which a kind applies, in random order; stacks alternate."""
    per_stack = []
    for stack in kind.stacks:
        phases = kind.phases_on(stack)
        per_stack.append([(stack, phase) for phase in generator.sample(phases, len(phases))])
    rounds = itertools.zip_longest(*per_stack)
    pairs = [pair for round_pairs in rounds for pair in round_pairs if pair is not None]
    first = generator.randrange(len(pairs))
    return pairs[first:] + pairs[:first]
