"""Chat templates: what text the model continues, and which tokens are a data set's answer."""

import pytest
from byte_tokenizer import byte_tokenizer

from slime_opd.data.chat import Renderer, last_answer, messages, template_arguments
from slime_opd.errors import ConfigError, DataError

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_a_message_list_is_rendered_up_to_the_generation_prompt(tokenizer):
    text = Renderer(tokenizer, {}).prompt(HELLO, "row 1")
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_string_is_one_user_message_with_a_template_and_itself_without(tokenizer):
    assert Renderer(tokenizer, {}).prompt("hi", "row 1") == Renderer(tokenizer, {}).prompt(HELLO, "row 1")
    assert Renderer(tokenizer, None).prompt("hi", "row 1") == "hi"


def test_template_arguments_reach_the_template(tokenizer):
    assert Renderer(tokenizer, template_arguments('{"think": true}')).prompt("hi", "row 1").endswith("<think>")


@pytest.mark.parametrize("text", ["{", "[1]", "true"])
def test_template_arguments_that_are_not_an_object_name_their_flag(text):
    with pytest.raises(ConfigError, match="--apply-chat-template-kwargs"):
        template_arguments(text)


def test_messages_without_a_template_name_the_flag_and_the_row(tokenizer):
    with pytest.raises(DataError, match=r"row 1: .*--apply-chat-template"):
        Renderer(tokenizer, None).prompt(HELLO, "row 1")


@pytest.mark.parametrize("value", [None, 3, [], ["hi"], [{"content": "hi"}], {"role": "user"}])
def test_a_value_that_is_not_a_prompt_is_an_error_with_or_without_template(tokenizer, value):
    for arguments in (None, {}):
        with pytest.raises(DataError, match=r"row 1: (the prompt is|a message of the prompt is)"):
            Renderer(tokenizer, arguments).prompt(value, "row 1")


def test_a_tokenizer_without_a_template_says_where_one_would_be():
    with pytest.raises(DataError) as caught:
        Renderer(byte_tokenizer(None), {}).prompt(HELLO, "row 1")
    assert "--apply-chat-template: the tokenizer of --hf-checkpoint has no chat template" in str(caught.value)
    assert "Cannot use chat template functions" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('only one turn') }}", "TemplateError: only one turn"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError: can only concatenate str"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_whatever_a_template_raises_names_the_row_and_the_flag(template, reason):
    with pytest.raises(
        DataError, match=r"row 1: the chat template .*--apply-chat-template.* failed on this row"
    ) as caught:
        Renderer(byte_tokenizer(template), {}).prompt(HELLO, "row 1")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (5, "the content of a message is a number; expected text"),
        ({"a": 1}, "the content of a message is an object; expected text"),
        ([{"type": "image", "image": "x.png"}], "a message has a part of type image; only text is supported"),
        ([{"type": "text"}], "a message has a part of type text without text; only text is supported"),
    ],
)
def test_content_that_a_template_would_print_as_python_is_refused(tokenizer, content, sentence):
    with pytest.raises(DataError, match=sentence):
        Renderer(tokenizer, {}).prompt([{"role": "user", "content": content}], "row 1")


def test_parts_of_text_are_joined(tokenizer):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert messages([{"role": "user", "content": parts}], "row 1") == HELLO


def test_half_of_a_surrogate_pair_is_refused_and_not_passed_to_the_tokenizer(tokenizer):
    for arguments in (None, {}):
        with pytest.raises(DataError, match=r"row 1: the prompt has the lone surrogate '\\ud800' at character"):
            Renderer(tokenizer, arguments).prompt("a \ud800", "row 1")


def test_nulls_that_parquet_fills_in_are_dropped_from_messages():
    assert messages([{"role": "user", "content": "hi", "tool_calls": None}], "row 1") == HELLO


def test_tokens_decode_to_the_text_and_nothing_is_added(tokenizer):
    text = Renderer(tokenizer, {}).prompt("a ü", "row 1")
    [tokens, nothing] = Renderer(tokenizer, {}).tokenize([text, ""])
    assert tokenizer.decode(tokens) == text
    assert nothing == []
    assert Renderer(tokenizer, {}).tokenize([]) == []


def test_the_answer_is_what_the_conversation_adds_up_to_its_last_end_of_sequence():
    assert last_answer([1, 2], [1, 2, 5, 9, 6, 9, 3], eos=9, where="row 1") == [5, 9, 6, 9]
    assert last_answer([1, 2], [1, 2, 5, 3], eos=9, where="row 1") == [5, 3]
    assert last_answer([1, 2], [1, 2, 5, 3], eos=None, where="row 1") == [5, 3]


@pytest.mark.parametrize("whole", [[1, 3, 5], [1]])
def test_a_conversation_that_does_not_begin_with_its_prompt_is_an_error(whole):
    with pytest.raises(DataError, match=r"row 1: .*renders the conversation differently .*from token 1 "):
        last_answer([1, 2], whole, eos=9, where="row 1")


def test_an_empty_answer_is_an_error():
    with pytest.raises(DataError, match=r"row 1: the last answer .* is empty"):
        last_answer([1, 2], [1, 2], eos=9, where="row 1")
