"""The prompts, as the run would read them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from slime_opd.config import Config
from slime_opd.preflight.findings import Findings, attempt

_ROWS = 64


def look_at_data(config: Config, tokenizer: Any, found: Findings) -> None:
    """Render and tokenise the first rows of every file, with the columns that the run reads."""
    from slime_opd.data.source import PromptSource, read_eval_set

    def prompts() -> str:
        data = replace(config.data, prompt_data=first_rows(config.data.prompt_data))
        source = PromptSource(data, tokenizer, is_sft=config.is_sft, response_key=config.divergence.opd_off_policy_key)
        longest = max(len(prompt.tokens) for prompt in source.take(len(source)))
        return f"--prompt-data {config.data.prompt_data}: first {len(source)} rows, longest prompt {longest} tokens"

    def evaluation(name: str, path: str) -> str:
        rows = read_eval_set(name, first_rows(path), config.data, config.evaluation, tokenizer)
        return f"--eval-prompt-data {name}: first {len(rows)} rows"

    if config.data.prompt_data and is_file(config.data.prompt_data):
        attempt(found, prompts)
    words = config.evaluation.eval_prompt_data
    for name, path in zip(words[::2], words[1::2], strict=False):
        if is_file(path):
            attempt(found, lambda name=name, path=path: evaluation(name, path))


def first_rows(file: str | None) -> str | None:
    return file if file is None or file.endswith("]") else f"{file}@[0:{_ROWS}]"


def is_file(file: str) -> bool:
    return Path(file.partition("@[")[0]).is_file()
