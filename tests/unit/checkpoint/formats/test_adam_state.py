"""The state of Adam, whichever implementation wrote the checkpoint."""

from types import SimpleNamespace

import pytest

from slime_opd.checkpoint.formats.adam_state import round_steps


@pytest.mark.parametrize("written", [2.0, 2])
def test_a_loaded_step_is_whole_because_the_fused_kernel_takes_no_other(written):
    # torch's Adam writes 2.0, Transformer Engine's FusedAdam 2 and, for a group without parameters, nothing.
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5, "step": written}, {"lr": 0.5}])
    round_steps(optimizer)
    first, second = optimizer.param_groups
    assert (first["step"], type(first["step"])) == (2, int)
    assert second == {"lr": 0.5}
