"""Lines of other libraries do not reach a user."""

from __future__ import annotations

import warnings

from slime_opd.observe.library_noise import silence_megatron


def test_other_warnings_are_still_seen():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        silence_megatron()
        warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
        warnings.warn("Your weights are on fire", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["Your weights are on fire"]
