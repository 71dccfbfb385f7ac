"""Copies tokenizer and config of a model into its checkpoint, for later comparisons with another model's."""

from __future__ import annotations

import shutil
from pathlib import Path

from slime_opd.checkpoint.location import TOKENIZER

# Files that AutoTokenizer and AutoConfig read, except Python files: no code is copied into a checkpoint.
_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "chat_template.jinja",
    "*.model", "*.tiktoken",
)  # fmt: skip


def copy_tokenizer(source: str | Path, checkpoint: Path) -> None:
    """Copy the tokenizer files of a Hugging Face directory into a torch_dist checkpoint."""
    target = checkpoint / TOKENIZER
    for file in sorted({path for pattern in _FILES for path in Path(source).glob(pattern) if path.is_file()}):
        target.mkdir(exist_ok=True)
        shutil.copyfile(file, target / file.name)
