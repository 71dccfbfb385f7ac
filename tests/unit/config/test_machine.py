"""A machine is looked at as it is: what is installed is told from what works."""

import importlib
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from slime_opd.config import machine
from slime_opd.config.kernels import Machine


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A GPU that is not there, and a function that installs a package for the test."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.syspath_prepend(str(tmp_path))
    machine._transformer_engine.cache_clear()
    before = set(sys.modules)

    def install(files: dict[str, str]) -> None:
        for name, source in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(source))
        importlib.invalidate_caches()

    yield install
    machine._transformer_engine.cache_clear()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("transformer_engine", "flash_attn"):
            del sys.modules[name]


UTILS = "transformer_engine/pytorch/attention/dot_product_attention/utils.py"
# The package swallows an ImportError of its part for torch, as Transformer Engine's does.
PACKAGE = "try:\n    from . import pytorch\nexcept ImportError:\n    pass\n"


def engine(pytorch: str = "") -> dict[str, str]:
    files = {"transformer_engine/__init__.py": PACKAGE, "transformer_engine/pytorch/__init__.py": pytorch}
    files |= {f"transformer_engine/pytorch/attention/{name}__init__.py": "" for name in ("", "dot_product_attention/")}
    return files | {UTILS: "class FlashAttentionUtils:\n    is_installed = True\n    v3_is_installed = False\n"}


def test_without_a_gpu_nothing_is_imported(monkeypatch):
    monkeypatch.setattr(machine, "_import", lambda name: pytest.fail(f"imported {name}"))
    assert machine.of_this_process() == Machine()


def test_an_engine_that_works_is_found_with_the_flash_attn_that_it_takes(pretended):
    pretended(engine())
    found = machine.of_this_process()
    assert (found.has_cuda, found.compute_capability) == (True, (9, 0))
    assert (found.engine, found.engine_error, found.engine_flash) == ("of unknown version", None, frozenset({2}))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise OSError('libcudnn.so.9: cannot open shared object file')", "OSError: libcudnn.so.9: cannot"),
        ("raise RuntimeError('cudnn shared object not found.')", "RuntimeError: cudnn shared"),
        ("raise ImportError('undefined symbol: _ZN3c10\\nmore')", "ImportError: undefined symbol: _ZN3c10"),
        ("assert False, 'package version mismatch'", "AssertionError: package version mismatch"),
    ],
)
def test_an_engine_that_is_broken_is_found_by_importing_it(pretended, source, reason):
    pretended(engine(source))
    found = machine.of_this_process()
    assert found.engine == "of unknown version"
    assert found.engine_error.startswith(reason)
    assert "\n" not in found.engine_error
    assert found.engine_flash == frozenset()


def test_an_engine_that_is_missing_is_no_error(pretended):
    found = machine.of_this_process()
    assert (found.engine, found.engine_error) == (None, None)


@pytest.mark.parametrize(
    ("source", "version"),
    [("__version__ = '2.8.3'", "2.8.3"), ("raise ImportError('undefined symbol')", None)],
)
def test_flash_attn_counts_where_it_can_be_imported(pretended, source, version):
    pretended({"flash_attn/__init__.py": source})
    assert machine.of_this_process().flash_attn == version


def test_the_options_of_the_installed_torchs_variable_length_attention_are_read(pretended):
    torch_attention = pytest.importorskip("torch.nn.attention.varlen")
    assert {"query", "scale", "window_size"} <= machine.of_this_process().varlen_options
    assert torch_attention.varlen_attn is not None


@pytest.mark.parametrize("source", ["raise OSError('no library')", "raise ImportError('undefined symbol')"])
def test_megatron_does_not_see_an_engine_that_is_broken(pretended, source):
    pretended(engine(source))
    with pytest.raises((OSError, ImportError)):
        importlib.import_module("transformer_engine.pytorch")
    machine.hide_unusable_engine()
    for name in ("transformer_engine", "transformer_engine.pytorch", UTILS.removesuffix(".py").replace("/", ".")):
        with pytest.raises(ImportError):
            importlib.import_module(name)
    assert machine.of_this_process().engine_error is not None


def test_an_engine_that_works_is_not_hidden(pretended):
    pretended(engine())
    machine.hide_unusable_engine()
    assert importlib.import_module("transformer_engine.pytorch")


def test_without_a_gpu_an_engine_is_hidden_and_not_imported(pretended, monkeypatch):
    import torch

    pretended(engine("raise SystemError('this import must not happen')"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine.hide_unusable_engine()
    with pytest.raises(ImportError):
        importlib.import_module("transformer_engine")


def test_a_machine_travels_as_one_line():
    described = Machine(
        has_cuda=True,
        compute_capability=(9, 0),
        varlen_options=frozenset({"scale", "query"}),
        engine="2.11.0",
        engine_error="OSError: no",
        engine_flash=frozenset({2, 3}),
        flash_attn="2.8.3",
    )
    text = machine.to_json(described)
    assert "\n" not in text
    assert machine.from_json(text) == described
    assert machine.from_json(machine.to_json(Machine())) == Machine()


@pytest.fixture
def computer_with_a_gpu(tmp_path, monkeypatch):
    (tmp_path / "nvidiactl").write_text("")
    monkeypatch.setattr(machine, "_CONTROL_DEVICE", tmp_path / "nvidiactl")
    machine.of_this_computer.cache_clear()
    yield
    machine.of_this_computer.cache_clear()


def test_a_computer_is_inspected_in_a_process_of_its_own(computer_with_a_gpu, monkeypatch):
    ran = []
    printed = "a library's greeting\n" + machine.to_json(Machine(has_cuda=True, engine="2.11.0")) + "\n"
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: ran.append(command) or SimpleNamespace(stdout=printed)
    )
    assert machine.of_this_computer() == Machine(has_cuda=True, engine="2.11.0")
    assert machine.of_this_computer().engine == "2.11.0"
    assert ran == [[sys.executable, "-m", "slime_opd.config.machine"]]


def test_the_inspecting_process_prints_a_machine(computer_with_a_gpu):
    assert machine.of_this_computer() == Machine()


def test_without_a_driver_no_process_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CONTROL_DEVICE", tmp_path / "none")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: pytest.fail("a process was started"))
    machine.of_this_computer.cache_clear()
    assert machine.of_this_computer() == Machine()
    machine.of_this_computer.cache_clear()


@pytest.mark.parametrize("device", ["_CONTROL_DEVICE", "_OTHER_DEVICES"])
def test_cuda_is_looked_for_only_where_there_is_a_driver(device, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    absent, driver = tmp_path / "none", tmp_path / "driver"
    driver.touch()
    monkeypatch.setattr(machine, "_CONTROL_DEVICE", absent)
    monkeypatch.setattr(machine, "_OTHER_DEVICES", (absent,))
    assert not machine.has_cuda()
    monkeypatch.setattr(machine, device, driver if device == "_CONTROL_DEVICE" else (absent, driver))
    assert machine.has_cuda()
