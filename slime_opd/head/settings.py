"""How chunks of tokens are scored."""

from __future__ import annotations

from dataclasses import dataclass

from slime_opd.distill.comparison import DivergenceOptions
from slime_opd.objective.options import Options, PolicyOptions


@dataclass(frozen=True)
class HeadSettings:
    """The objective, the temperatures of student and teacher, and the sizes of top-k sets.

    top_k: of the divergence's candidates, 0 for the whole vocabulary. metrics_top_k: of the overlap metrics, 0 for
    none.
    """

    objective: Options
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    top_k: int = 0
    metrics_top_k: int = 0

    @property
    def divergence(self) -> DivergenceOptions | None:
        """The divergence that compares student and teacher, if the objective has one."""
        return self.objective.divergence if isinstance(self.objective, PolicyOptions) else None
