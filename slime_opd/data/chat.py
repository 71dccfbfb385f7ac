"""Render a prompt column to text with the chat template, and tokenise it.

The tokenizer is any object with the interface of transformers' `PreTrainedTokenizerFast`. Tokenisation adds no special
tokens: a chat template writes them itself, and a plain string is not changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from slime_opd.data.formats import json_kind
from slime_opd.errors import ConfigError, DataError

Message = Mapping[str, Any]


def template_arguments(text: str) -> dict[str, Any]:
    """The JSON object of `--apply-chat-template-kwargs`. Raises ConfigError if it is not one."""
    try:
        arguments = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--apply-chat-template-kwargs: {text!r} is not valid JSON ({error.msg})") from error
    if not isinstance(arguments, dict):
        raise ConfigError(
            f'--apply-chat-template-kwargs: {text!r} is not a JSON object such as {{"enable_thinking": false}}'
        )
    return arguments


class Renderer:
    """Renders prompts with a tokenizer's chat template. `arguments`: the template's; None: no template."""

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None) -> None:
        self._tokenizer = tokenizer
        self._arguments = arguments

    def prompt(self, value: object, where: str) -> str:
        """The text that the model continues.

        With a template, a string is one user message, and the text ends with the generation prompt. Raises DataError,
        which names `where`, for a value that is neither a string nor a list of messages, and for messages without a
        template.
        """
        if self._arguments is None:
            if isinstance(value, str):
                return checked_text(value, where, "the prompt")
            messages(value, where)
            raise DataError(f"{where}: the prompt is a list of messages; add --apply-chat-template to render it")
        turns = [{"role": "user", "content": value}] if isinstance(value, str) else messages(value, where)
        return self._render(turns, where, add_generation_prompt=True)

    def conversation(self, value: object, where: str) -> str:
        """The text of a whole conversation, answers included."""
        return self._render(messages(value, where), where, add_generation_prompt=False)

    def _render(self, turns: Sequence[Message], where: str, *, add_generation_prompt: bool) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise DataError(
                "--apply-chat-template: the tokenizer of --hf-checkpoint has no chat template (chat_template in "
                "tokenizer_config.json, or chat_template.jinja); add one, or remove the flag"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=add_generation_prompt, **(self._arguments or {})
            )
        except Exception as error:  # a template is a program, and may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise DataError(
                f"{where}: the chat template of the tokenizer (--apply-chat-template) failed on this row: {reason}"
            ) from error
        return checked_text(text, where, "the prompt")

    def tokenize(self, texts: Sequence[str], where: str = "") -> list[list[int]]:
        """Token ids of each text. Raises DataError if the tokenizer fails; `where`: the row of the first text."""
        try:
            return self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        except Exception as error:  # tokenizers' Rust code raises plain Exception
            raise DataError(f"{where}: the tokenizer failed on this row or a following one: {error}") from error


def messages(value: object, where: str) -> list[Message]:
    """`value` as chat messages, without the null entries that Parquet adds.

    Raises DataError unless it is a non-empty list of objects with a `role`.
    """
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else json_kind(value)
        raise DataError(
            f"{where}: the prompt is {kind}; expected a string or a list of messages (--input-key sets the column)"
        )
    return [_message(turn, where) for turn in value]


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise DataError(
            f"{where}: a message of the prompt is {turn!r:.80}; expected an object with `role` and `content`"
        )
    message = {name: part for name, part in turn.items() if part is not None}
    if "content" in message:
        message["content"] = _content(message["content"], where)
    return message


def _content(content: object, where: str) -> str:
    """The text of a message; text parts are joined. Other types are refused: a template would print their repr."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        kinds = sorted({str(part.get("type")) for part in content} - {"text"})
        texts = [part.get("text") for part in content]
        if not kinds and all(isinstance(text, str) for text in texts):
            return "".join(texts)
        raise DataError(
            f"{where}: a message has a part of type {', '.join(kinds) or 'text without text'}; only text is supported"
        )
    raise DataError(f"{where}: the content of a message is {json_kind(content)}; expected text")


def checked_text(text: str, where: str, what: str) -> str:
    """`text` itself. Raises DataError for half of a surrogate pair, which JSON can hold and UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {what} has the lone surrogate {text[error.start]!a} at character {error.start}, "
            "which is not valid text; correct the row"
        ) from error
    return text


def ends_with_assistant(value: object) -> bool:
    """Whether the value of a prompt column is a conversation that ends with the assistant's answer."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[-1], Mapping)
        and value[-1].get("role") == "assistant"
    )


def last_answer(prompt: Sequence[int], conversation: Sequence[int], eos: int | None, where: str) -> list[int]:
    """The tokens of a conversation's last answer: those that follow `prompt` in `conversation`.

    Tokens after the last end-of-sequence token (a template's newline) are removed, since no rollout would generate
    them. Raises DataError if `conversation` does not begin with `prompt`, or the answer is empty.
    """
    length = len(prompt)
    if list(conversation[:length]) != list(prompt):
        pairs = zip(prompt, conversation, strict=False)
        index = next((i for i, (a, b) in enumerate(pairs) if a != b), min(length, len(conversation)))
        raise DataError(
            f"{where}: the chat template renders the conversation differently with its last answer (from token {index} "
            f"of the prompt's {length}), so the answer's tokens are ambiguous; change --apply-chat-template-kwargs, "
            "or give a string prompt and --label-key"
        )
    response = list(conversation[length:])
    if eos is not None and eos in response:
        response = response[: len(response) - response[::-1].index(eos)]
    if not response:
        raise DataError(f"{where}: the last answer of the conversation is empty; remove the row")
    return response
