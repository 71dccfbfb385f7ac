"""Lines of other libraries do not reach a user."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

from slime_opd.observe.library_noise import silence_megatron

IMPORTS = """
import logging
logging.basicConfig(level=logging.INFO)
logging.getLogger("megatron").setLevel(logging.WARNING)
from slime_opd.trainer import trainer
from megatron.core.rerun_state_machine import get_rerun_state_machine
get_rerun_state_machine()
"""


def test_nothing_is_printed_when_the_trainer_is_imported_and_takes_its_first_step():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    run = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        env=environment,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (run.stdout, run.stderr) == ("", "")


def test_other_warnings_are_still_seen():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        silence_megatron()
        warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
        warnings.warn("Your weights are on fire", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["Your weights are on fire"]
