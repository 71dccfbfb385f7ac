"""A scripted engine, teacher, reward and tokenizer."""

import asyncio
from dataclasses import dataclass, field

import numpy as np

from slime_opd.config.config import Config
from slime_opd.config.stages import DataConfig, EvaluationConfig, RolloutConfig
from slime_opd.engine.protocol import Generation
from slime_opd.teacher.sglang import ScoreRequest
from slime_opd.types import Prompt, TeacherScores

EOS = 0


class LetterTokenizer:
    """Token 1 is a, 2 is b, …; token 0 ends a sequence and token 27 is special."""

    eos_token_id = EOS

    def decode(self, tokens, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return "".join(chr(96 + token) if token else "<eos>" for token in tokens if token != 27)


def prompts(count, length=2):
    return [Prompt(index, tuple(range(1, length + 1)), "p", "b") for index in range(count)]


def config(evaluation=None, model=None, **rollout):
    options = {"rollout_max_response_len": 8, "rollout_max_context_len": 100, **rollout}
    extra = {} if model is None else {"model": model}
    return Config(
        rollout=RolloutConfig(**options),
        evaluation=evaluation or EvaluationConfig(),
        data=DataConfig(rollout_seed=5),
        **extra,
    )


def generation(tokens, reason="stop"):
    return Generation(tuple(tokens), -np.arange(1, len(tokens) + 1, dtype=np.float32), reason, None)


@dataclass
class FakeClient:
    """Answers request k with `answers(k)`: a Generation, an exception, or an awaitable of one."""

    answers: object
    requests: list = field(default_factory=list)
    cancelled: int = 0

    async def generate(self, input_ids, sampling, num_top_logprobs=0):
        number = len(self.requests)
        self.requests.append((tuple(input_ids), sampling))
        try:
            answer = self.answers(number)
            if asyncio.iscoroutine(answer):
                answer = await answer
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(answer, Exception):
            raise answer
        return answer


class FakeTeacher:
    """Scores every token -0.5; `fail` names the prompts it fails on. Sets `has_request` at the first request."""

    latest_failure = None

    def __init__(self, fail=()):
        self.fail = fail
        self.has_request = asyncio.Event()
        self.requests = []

    async def score(self, sample):
        self.requests.append(sample)
        self.has_request.set()
        if sample.prompt.index in self.fail:
            return self.failed_scores(sample, "no answer")
        return TeacherScores(np.full(sample.response_length, -0.5, dtype=np.float32))

    def failed_scores(self, sample, error):
        return ScoreRequest().missing_scores(sample.response_length, str(error))


class FirstLetterReward:
    """1.0 where the response begins with the label."""

    name = "first_letter"

    async def __call__(self, sample):
        return float(sample.response.startswith(sample.prompt.label))

    def close(self):
        pass
