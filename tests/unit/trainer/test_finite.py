"""Steps that are skipped: what is counted, when the run stops, and which sample is named."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.distributed as dist

from slime_opd.config import parse
from slime_opd.errors import NonFiniteError
from slime_opd.trainer import finite
from slime_opd.trainer.finite import SkippedSteps, describe_step, non_finite, unusable_values
from slime_opd.types import RolloutBatch, TrainBatch


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    """A world of this process alone."""
    path = tmp_path_factory.mktemp("rendezvous") / "file"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("losses", "gradients", "expected"),
    [
        ([1.0, -2.0], [[1.0, 2.0]], None),
        ([], [[0.0]], None),
        ([1.0, np.nan], [[1.0]], "loss"),
        ([np.inf], [[np.nan]], "loss"),
        ([1.0], [[1.0], [np.nan, 1.0]], "gradient"),
        ([1.0], [[-np.inf]], "gradient"),
        # Finite, and its square is not: Megatron's norm would be infinite, and clipping would turn the gradient into
        # zeros.
        ([1.0], [[1e30]], "gradient"),
        ([1.0], [[1e15]], None),
    ],
)
def test_a_loss_or_gradient_that_no_step_can_be_taken_with_is_found(losses, gradients, expected):
    found = non_finite([torch.tensor(loss) for loss in losses], [torch.tensor(gradient) for gradient in gradients])
    assert found == expected


def test_bfloat16_gradients_are_measured_in_float32():
    assert non_finite([], [torch.full((1000,), 1e4, dtype=torch.bfloat16)]) is None


def test_as_many_steps_in_a_row_as_the_limit_are_skipped_and_a_good_one_starts_the_row_anew(caplog):
    skipped = SkippedSteps(2)
    with caplog.at_level(logging.WARNING, logger=finite.__name__):
        for cause in ("loss", "gradient", None, "gradient", "gradient"):
            skipped.note(cause, lambda: "prompt 7")
    assert skipped.in_a_row == 2 and len(caplog.records) == 4
    assert "the gradient is not finite (prompt 7); 2 in a row" in caplog.text
    with pytest.raises(
        NonFiniteError, match=r"loss is not finite \(prompt 7\), in 3 optimizer steps.*--max-skipped-steps 2"
    ):
        skipped.note("loss", lambda: "prompt 7")


def test_with_a_limit_of_0_the_first_ends_the_run_and_without_one_none_does():
    with pytest.raises(NonFiniteError):
        SkippedSteps(0).note("loss")
    unlimited = SkippedSteps(None)
    for _ in range(100):
        unlimited.note("gradient")
    assert unlimited.in_a_row == 100


def test_overflows_that_find_the_loss_scale_are_counted_apart_and_end_no_run():
    skipped = SkippedSteps(0)
    for _ in range(30):
        skipped.note("overflow")
    counts = skipped.counts()
    assert counts["train/skipped_steps"] == counts["train/skipped_steps/overflow"] == 30
    assert counts["train/skipped_in_a_row"] == counts["train/skipped_steps/gradient"] == 0


def test_a_rollout_counts_its_own_steps_and_the_row_goes_on():
    skipped = SkippedSteps(3)
    skipped.note("loss")
    skipped.start_rollout()
    skipped.note("loss")
    assert skipped.counts()["train/skipped_steps"] == 1 and skipped.counts()["train/skipped_in_a_row"] == 2


def make_batch(**changed: tuple[int, float]) -> RolloutBatch:
    """Three samples of 2, 3 and 1 response tokens, of prompts 10, 11 and 12; the last token of prompt 11 does not
    train.
    """
    columns = {
        "advantages": np.ones(6, np.float32),
        "teacher_log_probs": np.full(6, -1.0, np.float32),
        "policy_weights": np.array([1, 1, 1, 1, 0, 1], np.float32),
        "group": np.array([10, 11, 12]),
    }
    for name, (place, value) in changed.items():
        columns[name][place] = value
    return RolloutBatch(np.zeros(9, np.int64), np.ones(3, np.int64), np.array([2, 3, 1]), columns)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"advantages": (3, np.nan)}, ["prompt 11: advantages is nan at response token 1"]),
        ({"teacher_log_probs": (5, -1e30)}, ["prompt 12: teacher_log_probs is -1e+30 at response token 0"]),
        ({"teacher_log_probs": (0, np.inf)}, ["prompt 10: teacher_log_probs is inf at response token 0"]),
        # A response that the teacher did not score has NaN by right; a token that does not train may have anything.
        ({"teacher_log_probs": (0, np.nan)}, []),
        ({"advantages": (4, np.nan)}, []),
    ],
)
def test_the_value_that_no_loss_can_be_made_of_is_named_with_its_prompt_and_token(changed, expected):
    assert unusable_values(make_batch(**changed)) == expected


def test_where_no_value_is_to_blame_the_prompts_of_the_micro_batch_are_named():
    batch = TrainBatch(make_batch(), ((2, 1),))
    losses = [torch.tensor(1.0), torch.tensor(np.nan)]
    assert describe_step(batch, 0, losses) == "in the micro-batch of prompt 12"
    assert describe_step(batch, 0, losses[:1]) == ""
    spoiled = TrainBatch(make_batch(advantages=(0, np.inf)), ((2, 1),))
    assert describe_step(spoiled, 0, losses) == "prompt 10: advantages is inf at response token 0"


def test_megatrons_flags_turn_the_check_off_and_on():
    assert parse(["--no-check-for-nan-in-loss-and-grad"]).megatron.check_for_nan_in_grad is False
    assert parse(["--check-for-nan-in-loss-and-grad"]).megatron.check_for_nan_in_grad is True
