"""How a command leaves: a closed pipe and Ctrl-C are no tracebacks."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from slime_opd.config.config import Config
from slime_opd.config.help import help_text
from slime_opd.config.output import BROKEN_PIPE, INTERRUPTED, terminal_width

ROOT = Path(__file__).parents[3]


def started(*arguments):
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("arguments", [["train", "--help"], ["train", "--check"], ["--help"]], ids=" ".join)
def test_a_reader_that_has_gone_ends_the_command_without_a_traceback(arguments):
    with started("-m", "slime_opd", *arguments) as process:
        process.stdout.close()
        assert process.wait(120) == BROKEN_PIPE
        assert process.stderr.read() == ""


# Ctrl-C comes at the moment when a module is imported.
INTERRUPTED_IMPORT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

# A shell starts what runs in the background with the signal ignored, and a test may be run so.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
sys.argv[1:] = {arguments!r}
from slime_opd import train
from slime_opd.config.parser import command_line
command_line(train.main)
"""


@pytest.mark.parametrize("module", ["slime_opd.preflight.check", "rich.console", "transformers", "torch.nn"])
def test_ctrl_c_while_the_check_imports_ends_it_with_130_and_one_line(module, tiny_model_dir, tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    arguments = ["--check", "--hf-checkpoint", str(tiny_model_dir), "--prompt-data", str(tmp_path / "data.parquet")]
    with started("-c", INTERRUPTED_IMPORT.format(module=module, arguments=arguments)) as process:
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (INTERRUPTED, "slime_opd: interrupted\n")


def test_only_a_terminal_has_a_width():
    assert terminal_width(io.StringIO()) is None


def test_on_a_terminal_the_help_is_wrapped_without_losing_text():
    whole, wrapped = help_text(Config, ["opd", "cluster"]), help_text(Config, ["opd", "cluster"], 100)
    assert max(map(len, whole.splitlines())) > 100 >= max(map(len, wrapped.splitlines()))
    assert wrapped.split() == whole.split()
