"""The prompts of a run, in a reproducible order, with a cursor that can be saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slime_opd.config import Config
from slime_opd.config.stages import DataConfig
from slime_opd.data import chat
from slime_opd.data.columns import Columns, evaluation_columns, training_columns
from slime_opd.data.entries import Entry, load_entries
from slime_opd.data.lengths import LengthLimits, evaluation_limits, training_limits
from slime_opd.data.reader import RowReader
from slime_opd.data.summary import Summary, summarize
from slime_opd.errors import CheckpointError, ConfigError, DataError
from slime_opd.types import Prompt


class PromptSource:
    """An endless sequence of prompts, epoch after epoch, with a cursor that can be saved.

    All rows are rendered and tokenised when it is made, so bad rows are reported before a GPU is used. With
    `--rollout-shuffle`, epoch e is shuffled with the seed `--rollout-seed` + e.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Any,
        *,
        is_sft: bool = False,
        columns: Columns | None = None,
        limits: LengthLimits | None = None,
    ) -> None:
        """Read `--prompt-data`. `columns` and `limits` default to those in `data`.

        Raises ConfigError without --prompt-data, DataError for a file or row that cannot be used.
        """
        if data.prompt_data is None:
            raise ConfigError("--prompt-data is missing: set it to a file of prompts")
        self._data = data
        self._entries, self.summary = _load(
            data.prompt_data,
            data,
            tokenizer,
            columns or Columns(data.input_key, data.label_key, data.metadata_key),
            limits or LengthLimits(max_prompt=data.rollout_max_prompt_len),
            is_sft=is_sft,
        )
        self._fingerprint = _fingerprint(self._entries)
        self._epoch = 0
        self._offset = 0
        self._order = self._order_of(0)

    @classmethod
    def of_run(cls, config: Config, tokenizer: Any) -> PromptSource:
        """The training prompts of a run, with the columns and limits from its options."""
        return cls(
            config.data,
            tokenizer,
            is_sft=config.is_sft,
            columns=training_columns(config),
            limits=training_limits(config),
        )

    def __len__(self) -> int:
        """Number of prompts of one epoch, without dropped ones."""
        return len(self._entries)

    @property
    def first(self) -> Prompt:
        """The first prompt of the file, which may not be the first of the run."""
        return self._entries[0].prompt(0)

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
        # RandomState, not Generator: numpy guarantees that its stream is the same in all versions.
        return np.random.RandomState((self._data.rollout_seed + epoch) % 2**32).permutation(len(self))

    def state(self) -> dict[str, Any]:
        """The position in the prompts, for `load_state`, as plain JSON values."""
        return {"epoch": self._epoch, "offset": self._offset, **self.identity()}

    def identity(self) -> dict[str, Any]:
        """Values that identify the prompts and their order, as plain JSON values."""
        return {
            "rows": len(self),
            "fingerprint": self._fingerprint,
            "rollout_shuffle": self._data.rollout_shuffle,
            "rollout_seed": self._data.rollout_seed,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue at a position that `state` returned.

        Raises CheckpointError if the prompts or their order differ from those of the saved run.
        """
        mine = self.identity()
        if missing := [name for name in ("epoch", "offset", *mine) if name not in state]:
            raise CheckpointError(
                f"the saved position in --prompt-data has no {', '.join(missing)}: another version wrote it"
            )
        for name in ("rollout_shuffle", "rollout_seed"):
            if state[name] != mine[name]:
                raise CheckpointError(
                    f"--{name.replace('_', '-')} is {mine[name]}, the checkpoint was saved with {state[name]}: the "
                    "order of the prompts would change; restore the value, or start a new run with --finetune"
                )
        if state["fingerprint"] != mine["fingerprint"]:
            raise CheckpointError(
                f"--prompt-data {self._data.prompt_data} has {mine['rows']} prompts, which are not the {state['rows']} "
                "of the checkpoint (another file, column, template, tokenizer or length limit); restore them, "
                "or start a new run with --finetune"
            )
        self._epoch = int(state["epoch"])
        self._offset = int(state["offset"])
        self._order = self._order_of(self._epoch)


def read_eval_set(name: str, path: str, config: Config, tokenizer: Any) -> tuple[list[Prompt], Summary]:
    """The prompts of an evaluation set, in file order, and a summary of the file.

    Raises DataError, which names `--eval-prompt-data` and the set.
    """
    try:
        entries, summary = _load(
            path, config.data, tokenizer, evaluation_columns(config), evaluation_limits(config), is_sft=False
        )
    except DataError as error:
        lines = [f"--eval-prompt-data {name}: {line}" for line in str(error).splitlines()]
        raise DataError("\n".join(lines)) from error
    return [entry.prompt(index) for index, entry in enumerate(entries)], summary


def _load(
    path: str, data: DataConfig, tokenizer: Any, columns: Columns, limits: LengthLimits, *, is_sft: bool
) -> tuple[list[Entry], Summary]:
    arguments = chat.template_arguments(data.apply_chat_template_kwargs) if data.apply_chat_template else None
    entries, notes = load_entries(
        RowReader(path, data.max_row_bytes),
        path,
        columns,
        chat.Renderer(tokenizer, arguments),
        limits,
        is_sft=is_sft,
        eos=getattr(tokenizer, "eos_token_id", None),
    )
    has_labels = columns.label_key is not None and not is_sft
    return entries, summarize(entries, has_label_column=has_labels, notes=notes)


def _fingerprint(entries: Sequence[Entry]) -> str:
    """Hash of the tokens, labels and responses, in file order."""
    digest = hashlib.blake2b(digest_size=16)
    for entry in entries:
        for part in (entry.tokens, entry.response_tokens):
            blob = b"" if part is None else part.tobytes()
            digest.update(len(blob).to_bytes(8, "little") + blob)
        digest.update(json.dumps(entry.label).encode() + b"\n")
    return digest.hexdigest()
