"""Five steps of every kind of training on recorded rollouts give the numbers that are kept in tests/golden/expected.json.

Tolerance: 1e-4 relative for losses and gradient norms, 1e-5 for weights. What is left is the order of float32 sums, which layouts,
machines and libraries change; a change of an objective, a weight or a denominator is far above it.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from measure import EXPECTED, LAYOUTS, measure, save_models, summary

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recorded_rollouts_train_to_the_numbers_that_are_kept(layout, tmp_path):
    save_models(tmp_path)
    outcomes = measure(layout, tmp_path)
    expected = json.loads(EXPECTED.read_text())
    assert set(outcomes) == set(expected)
    for name, outcome in outcomes.items():
        found = summary(outcome)
        np.testing.assert_allclose(found["steps"], expected[name]["steps"], rtol=1e-4, atol=1e-6, err_msg=name)
        assert set(found["weights"]) == set(expected[name]["weights"])
        for weight, values in found["weights"].items():
            np.testing.assert_allclose(
                values, expected[name]["weights"][weight], rtol=1e-5, atol=1e-5, err_msg=f"{name}: {weight}"
            )
