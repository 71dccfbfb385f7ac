"""Final answers as text."""

import asyncio

import pytest

from slime_opd.errors import DataError
from slime_opd.reward.exact_match import ExactMatch, final_answer, last_boxed
from slime_opd.types import Prompt, Sample, Status


def sample(response, label):
    return Sample(Prompt(3, (1,), "p", label), (2,), response, Status.COMPLETED)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 42\n", "42"),
        ("so it is\n#### 42 ", "42"),
        ("#### 1 #### 2", "2"),
        (r"\boxed{7} but #### 8", "8"),
        (r"first \boxed{1}, then \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        ("3 + 4 = 7", "3 + 4 = 7"),
        ("", ""),
    ],
)
def test_the_final_answer_is_after_hashes_else_boxed_else_the_whole_text(text, expected):
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{a{b{c}}d}", "a{b{c}}d"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{x < 1\}}", r"x < 1\}"),
        (r"\boxed{a \\} and more}", r"a \\"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", ""),
        ("boxed{1}", None),
    ],
)
def test_the_last_complete_box_is_found_with_braces_matched(text, expected):
    assert last_boxed(text) == expected


def test_equal_final_answers_give_one_and_others_zero():
    reward = ExactMatch()
    assert asyncio.run(reward(sample("we get #### 42", "42"))) == 1.0
    assert asyncio.run(reward(sample("42", "because #### 42"))) == 1.0
    assert asyncio.run(reward(sample("42.0", "42"))) == 0.0


def test_a_missing_label_names_prompt_and_flag():
    with pytest.raises(DataError, match=r"prompt 3 has none; set --label-key"):
        asyncio.run(ExactMatch()(sample("42", None)))
