"""Load the tokenizer of a Hugging Face directory, without running code from it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slime_opd.errors import ConfigError

_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")


def load_tokenizer(path: str | Path, option: str) -> Any:
    """The tokenizer in a Hugging Face directory. Raises ConfigError, which names `option`, if it cannot be loaded."""
    root = Path(path)
    if not any(file for pattern in _VOCABULARY_FILES for file in root.glob(pattern)):
        raise ConfigError(
            f"{option} {root}: found no tokenizer, expected tokenizer.json and tokenizer_config.json; "
            "copy them from the model's original directory"
        )
    for name in _JSON_FILES:
        _check_json(root / name, option)
    with _quiet():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=False)
            size = len(tokenizer)
        except (KeyboardInterrupt, SystemExit):
            raise
        # transformers may raise anything, and a panic in tokenizers' Rust code is a BaseException.
        except BaseException as error:
            raise ConfigError(f"{option} {root}: its tokenizer cannot be loaded: {_one_line(error)}") from error
    if size == 0:
        raise ConfigError(f"{option} {root}: its tokenizer has no tokens; are its files complete?")
    return tokenizer


def _check_json(file: Path, option: str) -> None:
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{option}: {file} is not valid JSON ({_one_line(error)}); is it complete?") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{option}: {file} is not a JSON object; is it a tokenizer's file?")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without transformers' warnings, which do not apply to the uses of the tokenizer here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
