"""Which reward a run uses, custom functions, and rewards that fail."""

import asyncio

import custom_reward_functions
import pytest

from slime_opd.config.config import Config
from slime_opd.config.stages import EvaluationConfig, RewardConfig
from slime_opd.errors import ConfigError, DataError
from slime_opd.reward.custom import CustomReward
from slime_opd.reward.exact_match import ExactMatch
from slime_opd.reward.math import MathReward
from slime_opd.reward.reward import compute_reward, make_eval_reward, make_reward
from slime_opd.types import Prompt, Sample, Status

MODULE = custom_reward_functions.__name__


def sample(response="abc"):
    return Sample(Prompt(3, (1,), "p", "42"), (2,), response, Status.COMPLETED)


def config(eval_sets=("math500", "math500.parquet"), eval_rm_type=None, **reward):
    return Config(
        reward=RewardConfig(**reward),
        evaluation=EvaluationConfig(eval_prompt_data=eval_sets, eval_rm_type=eval_rm_type),
    )


def test_training_uses_the_custom_reward_else_the_type_else_none():
    assert make_reward(config()) is None
    assert isinstance(make_reward(config(rm_type="deepscaler")), MathReward)
    assert isinstance(make_reward(config(rm_type="exact_match")), ExactMatch)
    assert isinstance(make_reward(config(rm_type="math", custom_rm_path=f"{MODULE}.length")), CustomReward)


def test_evaluation_uses_its_own_type_else_trainings_reward_else_math():
    assert isinstance(make_eval_reward(config(rm_type="math", eval_rm_type="exact_match")), ExactMatch)
    assert isinstance(make_eval_reward(config(custom_rm_path=f"{MODULE}.length")), CustomReward)
    assert isinstance(make_eval_reward(config(rm_type="exact_match")), ExactMatch)
    assert isinstance(make_eval_reward(config()), MathReward)
    assert make_eval_reward(config(eval_sets=(), rm_type="math")) is None


@pytest.mark.parametrize(
    ("function", "expected"),
    [("length", 3.0), ("length_async", 3.0), ("sync_that_returns_a_coroutine", 3.0), ("is_on_another_thread", 1.0)],
)
def test_a_custom_reward_may_be_async_or_not_and_never_blocks_the_loop(function, expected):
    value = asyncio.run(compute_reward(CustomReward(f"{MODULE}.{function}", Config()), sample()))
    assert value == expected and type(value) is float


@pytest.mark.parametrize(
    ("function", "message"),
    [("raises", "KeyError: 'score'"), ("not_a_number", "returned nan"), ("a_dict", "returned {'score': 1.0}")],
)
def test_an_error_of_a_custom_reward_names_the_reward_and_the_prompt(function, message):
    with pytest.raises(DataError) as caught:
        asyncio.run(compute_reward(CustomReward(f"{MODULE}.{function}", Config()), sample()))
    assert f"{MODULE}.{function}" in str(caught.value)
    assert "prompt 3" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("length", "expected MODULE.FUNCTION"),
        (
            "no_such_module.length",
            "cannot import no_such_module: there is no module no_such_module; is its folder on PYTHONPATH?",
        ),
        (f"{MODULE}.width", "has no function 'width'"),
        (f"{MODULE}.NOT_A_FUNCTION", "'NOT_A_FUNCTION' of .* is 1, expected a function"),
    ],
)
def test_a_custom_path_that_cannot_be_imported_names_the_flag(path, message):
    with pytest.raises(ConfigError, match=f"--custom-rm-path {path}: .*{message}"):
        CustomReward(path, Config())
