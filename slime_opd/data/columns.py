"""The columns of a data file that a run reads, and the checks of their values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from slime_opd.config import Config
from slime_opd.data.chat import checked_text
from slime_opd.data.formats import json_kind
from slime_opd.data.reader import Row
from slime_opd.errors import DataError


@dataclass(frozen=True)
class Columns:
    """The columns that a run reads, and the flags that set them.

    `label_user`: the flag of the built-in reward that needs a label with a single answer in every row; None: labels may
    be anything.
    """

    input_key: str
    label_key: str | None
    metadata_key: str
    response_key: str | None = None
    label_user: str | None = None
    input_flag: str = "--input-key"
    label_flag: str = "--label-key"

    def input(self, row: Row) -> Any:
        """The prompt: text or messages."""
        return row.get(self.input_key, self.input_flag)

    def label(self, row: Row) -> str | None:
        """The label as text; numbers, lists and objects as JSON. None without a label.

        Raises DataError if a built-in reward compares with the label, and it is missing or not a single answer.
        """
        if self.label_key is None:
            return None
        value = row.get(self.label_key, self.label_flag)
        name = f"the label ({self.label_flag} {self.label_key})"
        if self.label_user is not None:
            if value is None or (isinstance(value, str) and not value.strip()):
                state = "null" if value is None else "empty"
                raise DataError(
                    f"{row.where}: {name} is {state}, and {self.label_user} compares with it; correct or remove the row"
                )
            if isinstance(value, list | Mapping):
                raise DataError(
                    f"{row.where}: {name} is {json_kind(value)}, and {self.label_user} compares with a single answer; "
                    "select a column inside it with dots, or use --custom-rm-path"
                )
        return None if value is None else _label_text(value, row, name)

    def metadata(self, row: Row) -> Mapping[str, Any]:
        """The metadata for custom rewards; {} if the row has none."""
        value = row.get(self.metadata_key) if row.has(self.metadata_key) else None
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise DataError(
                f"{row.where}: --metadata-key {self.metadata_key} is {json_kind(value)}; "
                "expected an object, or another column"
            )
        return value

    def response(self, row: Row) -> str | None:
        """The response of another model, for --opd-off-policy-source dataset; None if no column of it is set."""
        if self.response_key is None:
            return None
        value = row.get(self.response_key, "--opd-off-policy-key")
        if not isinstance(value, str) or not value:
            kind = "an empty string" if value == "" else json_kind(value)
            raise DataError(
                f"{row.where}: --opd-off-policy-key {self.response_key} is {kind}; expected the text of a response"
            )
        return checked_text(value, row.where, "the response")


def training_columns(config: Config) -> Columns:
    """The columns of `--prompt-data`."""
    data, rm_type = config.data, config.reward.rm_type
    compares = rm_type is not None and config.reward.custom_rm_path is None and not config.is_sft
    return Columns(
        data.input_key,
        data.label_key,
        data.metadata_key,
        config.divergence.opd_off_policy_key,
        label_user=f"--rm-type {rm_type}" if compares else None,
    )


def evaluation_columns(config: Config) -> Columns:
    """The columns of `--eval-prompt-data`: --eval-input-key and --eval-label-key if set, else those of training."""
    data, evaluation = config.data, config.evaluation
    rm_type = evaluation.eval_rm_type
    if rm_type is None and config.reward.custom_rm_path is None:
        rm_type = config.reward.rm_type or "math"
    return Columns(
        evaluation.eval_input_key or data.input_key,
        evaluation.eval_label_key or data.label_key,
        data.metadata_key,
        label_user=None if rm_type is None else f"the reward {rm_type}",
        input_flag="--eval-input-key" if evaluation.eval_input_key else "--input-key",
        label_flag="--eval-label-key" if evaluation.eval_label_key else "--label-key",
    )


def _label_text(value: Any, row: Row, name: str) -> str:
    if isinstance(value, str):
        return checked_text(value, row.where, name)
    if isinstance(value, Decimal):  # Parquet's
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{row.where}: {name} is {value}; expected text or a finite number")
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{row.where}: {name} is {json_kind(value)} that JSON cannot hold ({error}); store it as text"
        ) from error
    return checked_text(text, row.where, name)
