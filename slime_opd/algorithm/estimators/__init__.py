"""The table of advantage estimators, one file each.

To add one: a file here, a row below, and its name among the choices of --advantage-estimator.
"""

from __future__ import annotations

from slime_opd.algorithm.estimators import grpo, rloo
from slime_opd.algorithm.estimators.estimator import Estimator

ESTIMATORS: dict[str, Estimator] = {
    "grpo": Estimator(grpo.advantages),
    "rloo": Estimator(rloo.advantages),
}
