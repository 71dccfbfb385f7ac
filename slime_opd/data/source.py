"""The prompts of a run, in an order that a resumed run repeats."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from slime_opd.config.stages import DataConfig, EvaluationConfig
from slime_opd.data import chat
from slime_opd.data.reader import Row, read_rows
from slime_opd.errors import CheckpointError, ConfigError, DataError
from slime_opd.types import Prompt

logger = logging.getLogger(__name__)

_ROWS_PER_BATCH = 2048
_SECONDS_BETWEEN_PROGRESS = 5.0


@dataclass(frozen=True)
class _Entry:
    """One usable row, tokenised: int32 arrays, because tuples of a large set would not fit."""

    text: str
    tokens: np.ndarray
    label: str | None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    response_tokens: np.ndarray | None = None

    def prompt(self, index: int) -> Prompt:
        response = None if self.response_tokens is None else tuple(self.response_tokens.tolist())
        return Prompt(index, tuple(self.tokens.tolist()), self.text, self.label, self.metadata, response)


class PromptSource:
    """An endless sequence of prompts, epoch after epoch, with a cursor that can be saved.

    Every row is rendered and tokenised at the start, so bad rows are found before a GPU is
    taken. With `--rollout-shuffle`, epoch e has the order of seed `--rollout-seed` + e.
    """

    def __init__(
        self, data: DataConfig, tokenizer: Any, *, is_sft: bool = False, response_key: str | None = None
    ) -> None:
        """Read `--prompt-data`, and the responses of another model in column `response_key`, if given.

        Raises ConfigError without prompts, DataError for a file or row that cannot be used.
        """
        if data.prompt_data is None:
            raise ConfigError("--prompt-data is missing: give a JSONL or Parquet file of prompts")
        self._data = data
        self._entries = _within_length(
            _load(data.prompt_data, data, tokenizer, is_sft, response_key=response_key), data
        )
        self._fingerprint = _fingerprint(self._entries)
        self._epoch = 0
        self._offset = 0
        self._order = self._order_of(0)

    def __len__(self) -> int:
        """Prompts of one epoch, too long ones left out."""
        return len(self._entries)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts; `Prompt.index` counts them from the start of the run."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Prompt:
        if self._offset == len(self):
            self._epoch += 1
            self._offset = 0
            self._order = self._order_of(self._epoch)
        prompt = self._entries[self._order[self._offset]].prompt(self._epoch * len(self) + self._offset)
        self._offset += 1
        return prompt

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self._data.rollout_shuffle:
            return np.arange(len(self))
        # RandomState, not Generator: numpy promises that its stream never changes between versions.
        return np.random.RandomState((self._data.rollout_seed + epoch) % 2**32).permutation(len(self))

    def state(self) -> dict[str, Any]:
        """Where the source stands, for `load_state`: plain JSON values."""
        return {"epoch": self._epoch, "offset": self._offset, **self.identity()}

    def identity(self) -> dict[str, Any]:
        """Which prompts these are, and in what order: plain JSON values."""
        return {
            "rows": len(self),
            "fingerprint": self._fingerprint,
            "rollout_shuffle": self._data.rollout_shuffle,
            "rollout_seed": self._data.rollout_seed,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises CheckpointError where the prompts or their order are not those of the saved run.
        """
        mine = self.identity()
        if missing := [name for name in ("epoch", "offset", *mine) if name not in state]:
            raise CheckpointError(
                f"the saved position in --prompt-data lacks {', '.join(missing)}: it is not of this version"
            )
        for name in ("rollout_shuffle", "rollout_seed"):
            if state[name] != mine[name]:
                raise CheckpointError(
                    f"--{name.replace('_', '-')} is {mine[name]}, the checkpoint was saved with {state[name]}: the order of the prompts would change; set it back, or start anew with --finetune"
                )
        if state["fingerprint"] != mine["fingerprint"]:
            raise CheckpointError(
                f"--prompt-data {self._data.prompt_data} gives {mine['rows']} prompts that are not the {state['rows']} of the checkpoint (another file, column, template, tokenizer or length limit); restore it, or start anew with --finetune"
            )
        self._epoch = int(state["epoch"])
        self._offset = int(state["offset"])
        self._order = self._order_of(self._epoch)


def read_eval_set(name: str, path: str, data: DataConfig, evaluation: EvaluationConfig, tokenizer: Any) -> list[Prompt]:
    """The prompts of an evaluation set, in file order; none is dropped for its length.

    Raises DataError that names `--eval-prompt-data` and the set.
    """
    keys = {
        "input_key": evaluation.eval_input_key or data.input_key,
        "label_key": evaluation.eval_label_key or data.label_key,
    }
    try:
        entries = _load(path, data, tokenizer, is_sft=False, **keys)
    except DataError as error:
        raise DataError(f"--eval-prompt-data {name}: {error}") from error
    return [entry.prompt(index) for index, entry in enumerate(entries)]


def _load(
    path: str,
    data: DataConfig,
    tokenizer: Any,
    is_sft: bool,
    input_key: str | None = None,
    label_key: str | None = None,
    response_key: str | None = None,
) -> list[_Entry]:
    """Every row of `path`, rendered and tokenised; keys not given are those of `data`."""
    arguments = chat.template_arguments(data.apply_chat_template_kwargs) if data.apply_chat_template else None
    renderer = chat.Renderer(tokenizer, arguments)
    columns = _Columns(input_key or data.input_key, label_key or data.label_key, data.metadata_key, response_key)
    rows = read_rows(path)
    eos = getattr(tokenizer, "eos_token_id", None)

    def entries(batch: Sequence[Row]) -> list[_Entry]:
        return (_sft_entries if is_sft else _entries)(batch, columns, renderer, eos)

    return list(_in_batches(rows, entries, path))


def _in_batches(rows: Sequence[Row], entries: Callable[[Sequence[Row]], list[_Entry]], path: str) -> Iterator[_Entry]:
    """`entries` of all rows, with a line of progress every few seconds."""
    started = reported = time.monotonic()
    for start in range(0, len(rows), _ROWS_PER_BATCH):
        if time.monotonic() - reported > _SECONDS_BETWEEN_PROGRESS:
            reported = time.monotonic()
            logger.info("%s: %d of %d prompts tokenised", path, start, len(rows))
        yield from entries(rows[start : start + _ROWS_PER_BATCH])
    logger.info("%s: %d prompts in %.1f s", path, len(rows), time.monotonic() - started)


@dataclass(frozen=True)
class _Columns:
    """Which column of a row holds what."""

    input_key: str
    label_key: str | None
    metadata_key: str
    response_key: str | None

    def label(self, row: Row) -> str | None:
        value = None if self.label_key is None else row.get(self.label_key)
        return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    def metadata(self, row: Row) -> Mapping[str, Any]:
        value = row.get(self.metadata_key) if row.has(self.metadata_key) else None
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise DataError(
                f"{row.where}: --metadata-key {self.metadata_key} is a {type(value).__name__}; expected an object"
            )
        return value

    def response(self, row: Row) -> str:
        """Another model's response, for --opd-off-policy-source dataset."""
        value = row.get(self.response_key)
        if not isinstance(value, str) or not value:
            raise DataError(
                f"{row.where}: --opd-off-policy-key {self.response_key} is {str(value)[:40]!r}; expected the text of a response"
            )
        return value


def _entries(rows: Sequence[Row], columns: _Columns, renderer: chat.Renderer, eos: int | None) -> list[_Entry]:
    texts = [renderer.prompt(row.get(columns.input_key), row.where) for row in rows]
    entries = [
        _Entry(text, _ids(tokens, row), columns.label(row), columns.metadata(row))
        for row, text, tokens in zip(rows, texts, renderer.tokenize(texts), strict=True)
    ]
    if columns.response_key is None:
        return entries
    responses = renderer.tokenize([columns.response(row) for row in rows])
    return [
        replace(entry, response_tokens=_ended(response, eos))
        for entry, response in zip(entries, responses, strict=True)
    ]


def _ended(response: Sequence[int], eos: int | None) -> np.ndarray:
    """A response's tokens with the end of sequence that a model would end it with."""
    return np.asarray([*response, *([] if eos is None else [eos])], np.int32)


def _sft_entries(rows: Sequence[Row], columns: _Columns, renderer: chat.Renderer, eos: int | None) -> list[_Entry]:
    """Prompts with the data set's own response.

    A conversation that ends with the assistant's answer is split there. Any other prompt has its
    response in `--label-key`, and an end-of-sequence token after it.
    """
    prompts, wholes = [], []
    for row in rows:
        value = row.get(columns.input_key)
        splits = chat.ends_with_assistant(value)
        prompts.append(renderer.prompt(value[:-1] if splits else value, row.where))
        wholes.append(renderer.conversation(value, row.where) if splits else _response_text(row, columns))
    entries = []
    for row, text, tokens, whole in zip(
        rows, prompts, renderer.tokenize(prompts), renderer.tokenize(wholes), strict=True
    ):
        if chat.ends_with_assistant(row.get(columns.input_key)):
            response = np.asarray(chat.response_of_conversation(tokens, whole, eos, row.where), np.int32)
        else:
            response = _ended(whole, eos)
        entries.append(_Entry(text, _ids(tokens, row), None, columns.metadata(row), response))
    return entries


def _response_text(row: Row, columns: _Columns) -> str:
    text = columns.label(row)
    if not text:
        raise DataError(
            f"{row.where}: no response to train on; sft_loss needs a message list that ends with the assistant's answer, or --label-key with the response"
        )
    return text


def _ids(tokens: Sequence[int], row: Row) -> np.ndarray:
    if not len(tokens):
        raise DataError(f"{row.where}: the prompt is empty; remove the row")
    return np.asarray(tokens, np.int32)


def _within_length(entries: list[_Entry], data: DataConfig) -> list[_Entry]:
    limit = data.rollout_max_prompt_len
    if limit is None:
        return entries
    kept = [entry for entry in entries if len(entry.tokens) <= limit]
    if not kept:
        shortest = min(len(entry.tokens) for entry in entries)
        raise DataError(
            f"{data.prompt_data}: --rollout-max-prompt-len {limit} drops all {len(entries)} prompts (the shortest has {shortest} tokens); raise it"
        )
    if len(kept) < len(entries):
        dropped = len(entries) - len(kept)
        logger.warning(
            "%s: %d of %d prompts dropped by --rollout-max-prompt-len %d",
            data.prompt_data,
            dropped,
            len(entries),
            limit,
        )
    return kept


def _fingerprint(entries: Sequence[_Entry]) -> str:
    """A hash of what the model is given: the tokens, labels and responses, in file order."""
    digest = hashlib.blake2b(digest_size=16)
    for entry in entries:
        for part in (entry.tokens, entry.response_tokens):
            blob = b"" if part is None else part.tobytes()
            digest.update(len(blob).to_bytes(8, "little") + blob)
        digest.update(json.dumps(entry.label).encode() + b"\n")
    return digest.hexdigest()
