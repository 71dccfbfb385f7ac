"""Ranges of numeric options: checked, and shown in messages, `--help` and docs/flags.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that an option accepts.

    `above` and `below` exclude the bound; `at_least` and `at_most` include it. `special` maps values outside the bounds
    that are accepted as well to their meaning. `reason` says why a number beyond the upper bound cannot be meant.
    """

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    special: tuple[tuple[float, str], ...] = ()
    reason: str = ""

    def __contains__(self, value: float) -> bool:
        if any(value == number for number, _ in self.special):
            return True
        is_above = (self.above is None or value > self.above) and (self.at_least is None or value >= self.at_least)
        return is_above and not self._is_too_large(value)

    def __str__(self) -> str:
        """The range as the end of `expected …`."""
        parts = [f"{number:.10g} ({meaning})" for number, meaning in self.special]
        return " or ".join([*parts, self._bounds()])

    @property
    def short(self) -> str:
        """The range as an interval, for tables: `> 0`, `in [0, 1)`."""
        parts = [f"{number:.10g}" for number, _ in self.special]
        lower = self.above if self.above is not None else self.at_least
        upper = self.below if self.below is not None else self.at_most
        if lower is None or upper is None:
            signs = (">", ">=") if upper is None else ("<", "<=")
            sign = signs[0 if (self.above if upper is None else self.below) is not None else 1]
            interval = f"{sign} {lower if upper is None else upper:.10g}"
        else:
            brackets = "[" if self.above is None else "(", "]" if self.below is None else ")"
            interval = f"in {brackets[0]}{lower:.10g}, {upper:.10g}{brackets[1]}"
        return " or ".join([*parts, interval])

    def expected(self, value: float) -> str:
        """The range, with the reason for the upper bound if `value` is beyond it."""
        return f"{self}: {self.reason}" if self.reason and self._is_too_large(value) else str(self)

    def _is_too_large(self, value: float) -> bool:
        return (self.below is not None and value >= self.below) or (self.at_most is not None and value > self.at_most)

    def _bounds(self) -> str:
        if self.above is not None and self.below is not None:
            return f"a number between {self.above:.10g} and {self.below:.10g}, both excluded"
        if self.at_least is not None and self.at_most is not None:
            return f"a number from {self.at_least:.10g} to {self.at_most:.10g}"
        lower = [] if self.above is None else [f"a number above {self.above:.10g}"]
        lower += [] if self.at_least is None else [f"{self.at_least:.10g} or more"]
        upper = [] if self.below is None else [f"below {self.below:.10g}"]
        upper += [] if self.at_most is None else [f"at most {self.at_most:.10g}"]
        return " and ".join([*lower, *upper])


POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(at_least=0)
FRACTION = Range(at_least=0, at_most=1)
POSITIVE_FRACTION = Range(above=0, at_most=1)
# Sampling from the most likely tokens.
TOP_K = Range(above=0, special=((-1, "all tokens"),))

# The upper bounds below are far beyond what any run uses.
LEARNING_RATE = Range(at_least=0, at_most=1, reason="Adam moves every weight by about that much in a step")
COEFFICIENT = Range(at_least=0, at_most=1e4, reason="it would drown every other part of the loss")
SEED = Range(at_least=0, at_most=2**31 - 1, reason="seeds have 31 bits")
SECONDS = Range(above=0, at_most=1e8, reason="that is three years")
_UNIFORM = "every token would be equally likely"
TEMPERATURE = Range(above=0, at_most=100, reason=_UNIFORM)
TEMPERATURE_OR_GREEDY = Range(at_least=0, at_most=100, reason=_UNIFORM)
