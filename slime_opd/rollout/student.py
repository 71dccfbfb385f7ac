"""The student as the run sees it: groups of scored samples for training, and evaluations."""

from __future__ import annotations

import logging
from typing import Any

from slime_opd.config import Config
from slime_opd.config.hf_config import language_model, read_hf_config
from slime_opd.data.source import PromptSource
from slime_opd.engine.client import EngineClient
from slime_opd.metrics import Mean
from slime_opd.observe.progress import Progress
from slime_opd.reward.reward import make_eval_reward, make_reward
from slime_opd.rollout.dataset import dataset_groups
from slime_opd.rollout.dynamic_sampling import kept_groups, load_filter
from slime_opd.rollout.evaluate import EvalSet, evaluate
from slime_opd.rollout.generate import Generator, OnSample, Teacher
from slime_opd.rollout.loop import BackgroundLoop
from slime_opd.teacher.fallback import check_fallback
from slime_opd.types import Sample, SampleGroup

logger = logging.getLogger(__name__)


class StudentRollouts:
    """Generates with the student's engines; one event loop in the background serves all requests."""

    def __init__(
        self,
        config: Config,
        tokenizer: Any,
        loop: BackgroundLoop,
        *,
        engine_url: str | None,
        engine_key: str | None = None,
        num_engines: int,
        teacher: Teacher | None,
        eval_sets: list[EvalSet],
        on_sample: OnSample = lambda sample: None,
    ) -> None:
        """`on_sample` is called as each sample is finished, scores and reward included."""
        self._on_sample = on_sample
        self._config, self._tokenizer, self._loop, self._teacher = config, tokenizer, loop, teacher
        self._eval_sets = eval_sets
        path = config.rollout.dynamic_sampling_filter_path
        self._keep = None if path is None else load_filter(path, config)
        # Of the last rollout, by dynamic sampling; None without it.
        self.groups_left_out: int | None = None
        self._reward, self._eval_reward = make_reward(config), make_eval_reward(config)
        self._client: EngineClient | None = None
        if engine_url is not None:
            rollout = config.rollout
            self._client = EngineClient(
                engine_url,
                concurrency=rollout.sglang_server_concurrency * num_engines,
                timeout_s=rollout.rollout_request_timeout_s,
                retries=rollout.rollout_request_retries,
                api_key=engine_key,
                vocabulary_size=language_model(read_hf_config(config.model.hf_checkpoint)).get("vocab_size"),
            )
            self._generator = Generator(self._client, tokenizer, config, reward=self._reward, teacher=teacher)

    def generate(self, source: PromptSource, label: str) -> list[SampleGroup]:
        """One rollout: the next prompts, their responses, rewards and teacher scores.

        Raises TooManyFallbacks when more samples than the limit have no teacher scores.
        """
        rollout = self._config.rollout
        if self._config.is_sft:
            return dataset_groups(source.take(rollout.rollout_batch_size), self._tokenizer)
        with Progress(label, self._config.samples_per_rollout, unit="samples") as progress:
            on_sample = self._count(progress)
            if self._keep is None:
                prompts = source.take(rollout.rollout_batch_size)
                groups = self._loop.run(self._generator.generate(prompts, on_sample))
            else:
                groups, self.groups_left_out = self._loop.run(
                    kept_groups(
                        self._generator.group,
                        source.take,
                        self._keep,
                        wanted=rollout.rollout_batch_size,
                        at_once=rollout.over_sampling_batch_size or rollout.rollout_batch_size,
                        on_group=lambda group: [on_sample(sample) for sample in group.samples],
                    )
                )
        failed = [s for group in groups for s in group.samples if s.values.get("teacher_failed", [0.0])[0]]
        check_fallback(
            len(failed),
            self._config.samples_per_rollout,
            self._config.opd.opd_max_fallback_fraction,
            None if self._teacher is None else self._teacher.latest_failure,
        )
        return groups

    def evaluate(self, label: str) -> dict[str, Mean]:
        """Evaluate on every evaluation set."""
        total = sum(len(eval_set.prompts) for eval_set in self._eval_sets)
        total *= self._config.evaluation.n_samples_per_eval_prompt
        with Progress(label, total, unit="samples") as progress:
            return self._loop.run(
                evaluate(
                    self._client,
                    self._tokenizer,
                    self._config,
                    self._eval_sets,
                    self._eval_reward,
                    self._count(progress),
                )
            )

    def _count(self, progress: Progress) -> OnSample:
        """A callback that moves `progress` by one sample and its tokens."""

        def count(sample: Sample) -> None:
            progress.advance(1, tokens=sample.response_length)
            self._on_sample(sample)

        return count

    def close(self) -> None:
        """Close connections and the workers of the rewards."""
        if self._client is not None:
            self._loop.run(self._generator.aclose())
            self._loop.run(self._client.aclose())
        for reward in (self._reward, self._eval_reward):
            if reward is not None:
                reward.close()
