"""Installed code that options need is there."""

import sys

import pytest

from slime_opd.config import parse
from slime_opd.preflight import check_packages


def test_layouts_of_transformer_engine_are_refused_without_it(monkeypatch):
    config = parse(["--expert-tensor-parallel-size=2"])
    monkeypatch.setattr(check_packages.importlib.util, "find_spec", lambda name: None)
    (problem,) = check_packages.check_engine(config)
    assert problem.startswith("--expert-tensor-parallel-size 2 needs Transformer Engine (")
    monkeypatch.setattr(check_packages.importlib.util, "find_spec", lambda name: object())
    assert check_packages.check_engine(config) == []


def test_a_custom_reward_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "my_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "strict.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert check_packages.check_custom_functions(parse(["--custom-rm-path", "my_rewards.strict.score"])) == []
    assert check_packages.check_custom_functions(parse(["--custom-rm-path", "my_rewards.score"])) == []
    assert "my_rewards" not in sys.modules


@pytest.mark.parametrize("path", ["no_such_module_here.score", "json.decoder.deeper.score", "os.path.missing.score"])
def test_a_custom_reward_whose_module_is_not_there_is_refused(path):
    (problem,) = check_packages.check_custom_functions(parse(["--custom-rm-path", path]))
    assert "found no module" in problem


@pytest.mark.parametrize("path", ["score", "my.", ".score", "my/file.py:score", "a.b-c"])
def test_a_custom_reward_that_is_no_dotted_name_is_refused(path):
    assert check_packages.check_custom_functions(parse(["--custom-rm-path", path])) == [
        f"--custom-rm-path: found {path!r}, expected MODULE.FUNCTION"
    ]
