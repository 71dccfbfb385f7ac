"""Options that differ on resume: each is honoured or refused, as declared beside it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from slime_opd.checkpoint.differences import differences, refusals, table
from slime_opd.checkpoint.record import identity_of, public_values, run_record
from slime_opd.checkpoint.start import request_of
from slime_opd.config.parser import parse
from slime_opd.config.redact import MASK


def found_between(before: str, after: str):
    saved = json.loads(json.dumps(public_values(parse(before.split()))))
    return differences(saved, public_values(parse(after.split())))


def test_equal_options_have_no_differences():
    words = "--lr 1e-3 --rollout-stop a b --sglang-mem-fraction-static 0.5 --num-experts 4"
    assert found_between(words, words) == []


def test_a_changed_learning_rate_is_honoured_and_shown():
    (one,) = found_between("--lr 1e-3", "--lr 2e-3")
    assert not one.is_refused
    heading, line = table([one])
    assert heading.split()[:3] == ["option", "saved", "now"]
    assert line.split()[:4] == ["--lr", "0.001", "0.002", "honoured"]


def test_megatrons_and_sglangs_options_are_compared_too():
    found = found_between("--sglang-mem-fraction-static 0.5", "--moe-aux-loss-coeff 0.1")
    assert {one.flag for one in found} == {"--sglang-mem-fraction-static", "--moe-aux-loss-coeff"}
    assert not any(one.is_refused for one in found)


@pytest.mark.parametrize(
    "words",
    ["--initial-loss-scale 8", "--seed 1", "--rollout-seed 1", "--rollout-shuffle", "--hidden-size 8", "--bf16"],
)
def test_what_the_checkpoint_fixes_is_refused_with_both_values(words):
    (sentence,) = refusals(found_between("", words))
    assert sentence.startswith(words.split()[0]) and "set it back" in sentence


def test_without_the_optimizers_state_another_loss_scale_is_honoured():
    assert refusals(found_between("", "--initial-loss-scale 8 --no-load-optim")) == []
    assert refusals(found_between("", "--rollout-seed 1 --no-load-optim")) != []


def test_options_of_the_start_are_not_reported_as_differences():
    assert found_between("--load a --finetune", "--load b --ckpt-step 3") == []


def test_an_option_that_the_saved_run_did_not_have_counts_as_its_default():
    now = public_values(parse(["--lr", "1e-3"]))
    saved = {name: value for name, value in now.items() if name not in ("lr", "min_lr")}
    (one,) = differences(saved, now)
    assert (one.name, one.saved, one.now) == ("lr", 1e-6, 1e-3)


def test_no_secret_is_recorded(tmp_path):
    config = parse(["--rm-url", "http://user:hunter2@host:1/generate", "--save", str(tmp_path)])
    config = dataclasses.replace(config, sglang={"api-key": ("hunter2",), "tp-size": ("2",)})
    text = json.dumps(run_record(config, request_of(config), identity_of(config, {}), "last"))
    assert "hunter2" not in text and MASK in text and "host:1/generate" in text and '"2"' in text
