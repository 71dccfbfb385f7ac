"""Sizes that cannot be meant, and large ones that can."""

from __future__ import annotations

import pytest

from slime_opd.config import check_sizes, parse
from slime_opd.config.checks import notes
from slime_opd.config.config import Config
from slime_opd.config.options import options_of


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--lr 1000", "--lr: found 1000.0, expected at most 1: Adam moves every weight"),
        ("--opd-kl-coef 1e9", "--opd-kl-coef: found 1000000000.0, expected at most 10000: it would drown"),
        ("--rollout-temperature 1e6", "--rollout-temperature: found 1000000.0, expected at most 100: every token"),
        ("--seed 4294967296", "--seed: found 4294967296, expected at most 2147483647: seeds have 31 bits"),
        ("--rollout-request-timeout-s 1e12", "that is three years"),
    ],
)
def test_a_number_that_cannot_be_meant_is_refused_with_the_reason(words, sentence):
    (problem,) = check_sizes.check_ceilings(parse(words.split()))
    assert sentence in problem


@pytest.mark.parametrize("words", ["--lr 1", "--opd-kl-coef 1000", "--seed 2147483647"])
def test_a_large_number_that_can_be_meant_passes(words):
    assert check_sizes.check_ceilings(parse(words.split())) == []


def test_every_ceiling_is_above_its_default():
    options = options_of(Config)
    for name, (largest, _) in check_sizes.CEILINGS.items():
        assert options[name].default is None or options[name].default < largest


def test_a_rollout_that_no_memory_holds_is_refused(monkeypatch):
    monkeypatch.setattr(check_sizes, "_memory_bytes", lambda: 16 * 2**30)
    words = "--rollout-max-response-len 1024 --n-samples-per-prompt 8 --rollout-batch-size"
    assert check_sizes.check_rollout_fits(parse([*words.split(), "4096"])) == []
    (problem,) = check_sizes.check_rollout_fits(parse([*words.split(), "1000000000000"]))
    # 8e12 samples of 500 + 20 · 1024 bytes.
    assert "the 8,000,000,000,000 samples of a rollout take 156,313,180 GiB" in problem and "has 16" in problem
    monkeypatch.setattr(check_sizes, "_memory_bytes", lambda: None)
    assert check_sizes.check_rollout_fits(parse([*words.split(), "1000000000000"])) == []


def test_more_processes_than_cores_can_run_are_refused_where_there_is_no_gpu():
    assert check_sizes.process_problem(trainers=6, engines=2, cores=2) is None
    problem = check_sizes.process_problem(trainers=64, engines=1, cores=2)
    assert "64 training processes and 1 of engines" in problem and "2 CPU cores" in problem
    assert check_sizes.process_problem(trainers=64, engines=1, cores=64) is None


def test_processes_are_counted_only_where_the_run_starts_its_own_ray_without_gpus(monkeypatch):
    monkeypatch.setattr(check_sizes, "_cores", lambda: 2)
    words = ["--actor-num-gpus-per-node", "64", "--ray-address"]
    assert len(check_sizes.check_processes(parse([*words, "local"]))) == 1
    assert check_sizes.check_processes(parse([*words, "auto"])) == []
    monkeypatch.setattr(check_sizes.Path, "glob", lambda *_: iter(["/dev/nvidia0"]))
    assert check_sizes.check_processes(parse([*words, "local"])) == []


def test_micro_batches_smaller_than_a_response_are_noted():
    words = "--use-dynamic-batch-size --rollout-max-response-len 512 --max-tokens-per-gpu"
    (note,) = (note for note in notes(parse([*words.split(), "10"])) if "max-tokens" in note)
    assert note.startswith("--max-tokens-per-gpu 10 is less than --rollout-max-response-len 512: a longer sample is")
    assert not [note for note in notes(parse([*words.split(), "512"])) if "max-tokens" in note]
