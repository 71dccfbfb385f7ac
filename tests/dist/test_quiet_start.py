"""A trainer's process prints no line of other libraries when it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

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
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (run.stdout, run.stderr) == ("", "")
