"""Rows of a data file, rendered, tokenised and filtered by length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from slime_opd.data import chat
from slime_opd.data.columns import Columns
from slime_opd.data.lengths import Excluded, LengthLimits
from slime_opd.data.reader import Row, RowReader
from slime_opd.errors import DataError
from slime_opd.observe.progress import Progress
from slime_opd.types import Prompt

_ROWS_PER_BATCH = 256


@dataclass(frozen=True)
class Entry:
    """One usable row. Tokens are int32 arrays: tuples of a large data set would not fit into memory."""

    text: str
    tokens: np.ndarray
    label: str | None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    response_tokens: np.ndarray | None = None

    def prompt(self, index: int) -> Prompt:
        """The entry as a Prompt with this index."""
        response = None if self.response_tokens is None else tuple(self.response_tokens.tolist())
        return Prompt(index, tuple(self.tokens.tolist()), self.text, self.label, self.metadata, response)


def load_entries(
    reader: RowReader,
    path: str,
    columns: Columns,
    renderer: chat.Renderer,
    limits: LengthLimits,
    *,
    is_sft: bool,
    eos: int | None,
) -> tuple[list[Entry], list[str]]:
    """The rows within the limits, in file order, and a note for each limit that dropped rows.

    Raises DataError for a row that cannot be used, and for rows beyond a limit that must not be dropped.
    """
    excluded, entries = Excluded(limits), []
    make = _sft_entries if is_sft else _entries
    with Progress(f"reading {path}", len(reader), unit="rows") as progress:
        for rows in _batches(reader):
            for row, entry in zip(rows, make(rows, columns, renderer, eos), strict=True):
                # Only a response that is trained on as a whole counts: others are generated or cut to fit.
                response = entry.response_tokens if is_sft else None
                response_length = None if response is None else len(response)
                if not excluded.excludes(row.where, len(entry.tokens), response_length):
                    entries.append(entry)
            progress.advance(len(rows))
    excluded.check(path, len(reader))
    return entries, excluded.notes(path, len(reader))


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, _ROWS_PER_BATCH)):
        yield batch


def _entries(rows: Sequence[Row], columns: Columns, renderer: chat.Renderer, eos: int | None) -> list[Entry]:
    texts = [renderer.prompt(columns.input(row), row.where) for row in rows]
    entries = [
        Entry(text, _ids(tokens, row), columns.label(row), columns.metadata(row))
        for row, text, tokens in zip(rows, texts, renderer.tokenize(texts, rows[0].where), strict=True)
    ]
    response_texts = [text for row in rows if (text := columns.response(row)) is not None]
    if not response_texts:
        return entries
    responses = renderer.tokenize(response_texts, rows[0].where)
    return [
        replace(entry, response_tokens=_with_eos(response, eos))
        for entry, response in zip(entries, responses, strict=True)
    ]


def _with_eos(response: Sequence[int], eos: int | None) -> np.ndarray:
    """A response's tokens, int32, with the end-of-sequence token appended."""
    return np.asarray([*response, *([] if eos is None else [eos])], np.int32)


def _sft_entries(rows: Sequence[Row], columns: Columns, renderer: chat.Renderer, eos: int | None) -> list[Entry]:
    """Entries for supervised fine-tuning, with the data set's responses.

    A conversation that ends with the assistant's answer is split before that answer. Any other prompt has its response
    in `--label-key`; the end-of-sequence token is appended to it.
    """
    # The target is the whole conversation, prompt included, or the response alone.
    prompts, targets = [], []
    for row in rows:
        value = columns.input(row)
        is_conversation = chat.ends_with_assistant(value)
        prompts.append(renderer.prompt(value[:-1] if is_conversation else value, row.where))
        targets.append(renderer.conversation(value, row.where) if is_conversation else _response_text(row, columns))
    entries = []
    for row, text, tokens, target in zip(
        rows,
        prompts,
        renderer.tokenize(prompts, rows[0].where),
        renderer.tokenize(targets, rows[0].where),
        strict=True,
    ):
        if chat.ends_with_assistant(columns.input(row)):
            response = np.asarray(chat.last_answer(tokens, target, eos, row.where), np.int32)
        else:
            response = _with_eos(target, eos)
        entries.append(Entry(text, _ids(tokens, row), None, columns.metadata(row), response))
    return entries


def _response_text(row: Row, columns: Columns) -> str:
    text = columns.label(row)
    if not text:
        raise DataError(
            f"{row.where}: no response to train on; sft_loss needs a message list that ends with the assistant's "
            "answer, or --label-key with the response"
        )
    return text


def _ids(tokens: Sequence[int], row: Row) -> np.ndarray:
    if not len(tokens):
        raise DataError(f"{row.where}: the prompt is empty; remove the row")
    return np.asarray(tokens, np.int32)
