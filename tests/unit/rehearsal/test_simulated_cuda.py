"""A rehearsal that is not possible is refused with the reason and what to do."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from slime_opd.errors import RehearsalError
from slime_opd.rehearsal import simulated_cuda


@pytest.fixture
def without_torch(monkeypatch, tmp_path):
    """torch is installed in tmp_path and not imported."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    return tmp_path


def test_a_process_that_has_imported_torch_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    with pytest.raises(RehearsalError, match="in its own process"):
        simulated_cuda.load()


def test_a_cuda_build_of_torch_is_refused(without_torch):
    (without_torch / "lib" / "libtorch_cuda.so").touch()
    with pytest.raises(RehearsalError, match=f"{without_torch} is a CUDA build.*setup_cpu.sh"):
        simulated_cuda.load()


def test_a_missing_compiler_is_named_and_how_to_install_one(without_torch, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RehearsalError, match="no no-such-compiler on PATH: install g\\+\\+"):
        simulated_cuda.load()


def test_a_compiler_that_fails_is_quoted(without_torch, monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:3: error: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RehearsalError, match="error: no such header"):
        simulated_cuda.load()
