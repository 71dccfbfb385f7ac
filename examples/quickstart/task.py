"""Three-digit addition with worked columns: the task behind the CPU quickstart.

A prompt is ``347+285=``. Its worked solution adds the columns from the right,
writing the carry as a third term, and then states the answer after ``####``::

    7+5=12;4+8+1=13;3+2+1=6####632

The task is small enough for a model of a few hundred thousand parameters, yet
it has what on-policy distillation is good at: an answer is right only when
some twenty-five tokens are all right, so a reward on the final answer says
little about which token went wrong while a teacher grades every one of them.

The teacher is trained on worked solutions. The student is that teacher after a
little more training on careless ones, in which most carries are forgotten and
many columns are miscounted; distillation is to give it back what it lost.

The problem generator needs the standard library only; ``tokenizers``,
``torch`` and ``transformers`` are imported by the functions that write a
tokenizer or a model.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ANSWER_MARK = "####"
COLUMN_MARK = ";"
CHARACTERS = "0123456789+=" + COLUMN_MARK
END_TOKEN = "<eos>"
PADDING_TOKEN = "<pad>"
UNKNOWN_TOKEN = "<unk>"

SMALLEST_OPERAND = 100
LARGEST_OPERAND = 999
PROMPT_LENGTH = len("347+285=")
# Three columns of at most "9+9=18", "9+9+1=19", "9+9+1=19", two separators,
# the mark, four digits and the end token.
LONGEST_RESPONSE = 6 + 8 + 8 + 2 + 1 + 4 + 1

# One problem in this many is held out.
HELDOUT_MODULUS = 10
# Longer than any prompt with its response; the model takes no more.
MAXIMUM_POSITIONS = 128

CARELESS_FORGET_CARRY = 0.85
CARELESS_MISCOUNT = 0.4


@dataclass(frozen=True)
class Problem:
    """The sum of two three-digit numbers."""

    left: int
    right: int

    @property
    def prompt(self) -> str:
        """The text the model sees; always ``PROMPT_LENGTH`` characters."""
        return f"{self.left}+{self.right}="

    @property
    def answer(self) -> str:
        """The right final answer."""
        return str(self.left + self.right)

    @property
    def is_heldout(self) -> bool:
        """Whether the problem is in the held-out split.

        The split is a property of the problem, not of a seed or of an order of
        generation, so no choice of sizes can leak a problem from one split
        into the other. ``a+b`` and ``b+a`` share a side, because a model that
        has seen one has all but seen the other. The hash is ``sha256``:
        Python's own ``hash`` is not promised to stay the same.
        """
        low, high = sorted((self.left, self.right))
        digest = hashlib.sha256(f"{low}+{high}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELDOUT_MODULUS == 0


def generate_problems(count: int, *, seed: int, heldout: bool) -> Iterator[Problem]:
    """Yield ``count`` distinct problems of one split, the same ones for the same seed."""
    generator = random.Random(seed)
    seen: set[Problem] = set()
    while len(seen) < count:
        problem = Problem(
            generator.randint(SMALLEST_OPERAND, LARGEST_OPERAND),
            generator.randint(SMALLEST_OPERAND, LARGEST_OPERAND),
        )
        if problem.is_heldout == heldout and problem not in seen:
            seen.add(problem)
            yield problem


def worked_solution(problem: Problem) -> str:
    """Return the response a perfect model gives, without the end token."""
    return _work(problem, forget_carry=0.0, miscount=0.0, generator=random.Random(0))


def careless_solution(
    problem: Problem,
    generator: random.Random,
    *,
    forget_carry: float = CARELESS_FORGET_CARRY,
    miscount: float = CARELESS_MISCOUNT,
) -> str:
    """Return a response in the habits the student starts with, without the end token.

    Each carry is forgotten with one probability, each column's total is off by
    one with another. The two differ in what they leave a student to unlearn: a
    carry is forgotten more often than not, so the student's likeliest response
    is wrong; a miscount is not, but it makes a sampled response wrong so often
    that a reward on the answer alone is rare and says little.
    """
    return _work(problem, forget_carry=forget_carry, miscount=miscount, generator=generator)


def _work(problem: Problem, *, forget_carry: float, miscount: float, generator: random.Random) -> str:
    """Write the columns from the right; the answer is what the columns say, right or wrong."""
    columns = []
    digits = []
    carry = 0
    total = 0
    for left, right in zip(reversed(str(problem.left)), reversed(str(problem.right)), strict=True):
        if carry and generator.random() < forget_carry:
            carry = 0
        total = int(left) + int(right) + carry
        if generator.random() < miscount:
            total = max(0, total + generator.choice((-1, 1)))
        # A carry of nought is left out: what to write then depends on the
        # column before, which is what makes carrying a step of reasoning.
        columns.append(f"{left}+{right}{'+1' if carry else ''}={total}")
        digits.append(str(total % 10))
        # A miscount can make 9+9+1 a 20; more than 1 is never carried.
        carry = min(1, total // 10)
    digits[-1] = str(total)
    return COLUMN_MARK.join(columns) + ANSWER_MARK + "".join(reversed(digits))


def write_problems(path: Path | str, count: int, *, seed: int, heldout: bool, careless: bool = False) -> None:
    """Write problems as JSON lines with the fields ``prompt``, ``response`` and ``label``.

    ``careless`` changes the responses alone: the problems and the labels stay
    those of the same seed.
    """
    # A generator of its own, so that the problems do not depend on ``careless``.
    generator = random.Random(f"careless {seed}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as lines:
        for problem in generate_problems(count, seed=seed, heldout=heldout):
            response = careless_solution(problem, generator) if careless else worked_solution(problem)
            row = {"prompt": problem.prompt, "response": response, "label": problem.answer}
            lines.write(json.dumps(row) + "\n")


def write_train(path: Path | str, count: int, *, seed: int = 1, careless: bool = False) -> None:
    """Write ``train.jsonl``: worked solutions for the teacher, careless ones for the student."""
    write_problems(path, count, seed=seed, heldout=False, careless=careless)


def write_heldout(path: Path | str, count: int = 256, *, seed: int = 2) -> None:
    """Write ``heldout.jsonl``; none of its problems can be in a training file."""
    write_problems(path, count, seed=seed, heldout=True)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token for each character and for the answer mark, nothing added in front or behind."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [PADDING_TOKEN, END_TOKEN, UNKNOWN_TOKEN, *CHARACTERS, ANSWER_MARK]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    # WordLevel looks whole words up; cutting between all characters makes every
    # character, and the answer mark, a word. Fuse puts them together again without spaces.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{ANSWER_MARK}|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=PADDING_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        clean_up_tokenization_spaces=False,
        model_max_length=MAXIMUM_POSITIONS,
    )
    # The model knows no roles: a conversation is its messages' text and no more.
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return wrapped


def save_tokenizer(directory: Path | str) -> None:
    """Build the tokenizer and save it."""
    build_tokenizer().save_pretrained(str(directory))


def save_random_model(
    directory: Path | str,
    *,
    seed: int,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    key_value_heads: int = 2,
    intermediate_size: int = 256,
) -> None:
    """Save a randomly initialised Qwen3 model with its tokenizer; the seed fixes the weights."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer()
    # Rows past the tokenizer's last token are never used: a multiple of 16
    # lets the vocabulary be cut evenly where a trainer shards it.
    vocabulary_size = -(-len(tokenizer) // 16) * 16
    config = Qwen3Config(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=32,
        max_position_embeddings=MAXIMUM_POSITIONS,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))


def main(directory: Path) -> None:
    """Write the files that run.sh starts from."""
    write_train(directory / "worked.jsonl", 20_000, seed=1)
    write_train(directory / "careless.jsonl", 20_000, seed=1, careless=True)
    write_heldout(directory / "heldout.jsonl", 512, seed=4)
    save_random_model(directory / "initial", seed=0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
