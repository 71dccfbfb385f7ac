"""The rollouts of a run: groups of rewarded and scored samples for training, and evaluations of the student."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from slime_opd.config import Config
from slime_opd.config.hf_config import language_model, read_hf_config
from slime_opd.data.source import PromptSource
from slime_opd.engine.client import EngineClient
from slime_opd.metrics import Mean, Metric, Replicated
from slime_opd.observe.progress import Progress
from slime_opd.reward.reward import make_eval_reward, make_reward
from slime_opd.rollout.dataset import dataset_groups
from slime_opd.rollout.dynamic_sampling import load_filter, sample_until_accepted
from slime_opd.rollout.evaluate import EvalSet, evaluate
from slime_opd.rollout.generate import Generator, OnSample
from slime_opd.rollout.loop import BackgroundLoop
from slime_opd.teacher.fallback import check_fallback
from slime_opd.teacher.session import TeacherSession
from slime_opd.types import Rollout, Sample, SampleGroup


class RolloutManager:
    """Makes rollouts and evaluates the student, with its engines. One background event loop serves all requests."""

    def __init__(
        self,
        config: Config,
        tokenizer: Any,
        source: PromptSource,
        loop: BackgroundLoop,
        *,
        client: EngineClient | None,
        teacher: TeacherSession | None,
        eval_sets: Sequence[EvalSet],
        on_sample: OnSample = lambda sample: None,
    ) -> None:
        """`client`: of the student's engines, closed with the manager; None for a run without engines.

        `on_sample` is called with each sample once it is complete, scores and reward included.
        """
        self._config, self._tokenizer, self._source, self._loop = config, tokenizer, source, loop
        self._client, self._teacher, self._eval_sets, self._on_sample = client, teacher, eval_sets, on_sample
        path = config.rollout.dynamic_sampling_filter_path
        self._accept = None if path is None else load_filter(path, config)
        self._reward, self._eval_reward = make_reward(config), make_eval_reward(config)
        self._generator: Generator | None = None
        if client is not None:
            scorer = None if teacher is None else teacher.teacher
            self._generator = Generator(client, tokenizer, config, reward=self._reward, teacher=scorer)

    def generate(self, step: int, label: str, weights_version: int) -> Rollout:
        """The rollout of `step` (from 0): the next prompts, their responses, rewards and teacher scores.

        `label` names it in the progress bar; `weights_version` is that of the weights that the engines serve. Raises
        TooManyFallbacks where more samples than the limit have no teacher scores.
        """
        started = time.perf_counter()
        if self._config.is_sft:
            prompts = self._source.take(self._config.rollout.rollout_batch_size)
            groups, metrics = dataset_groups(prompts, self._tokenizer), {}
        else:
            groups, metrics = self._generate(step, label)
        timings = {"rollout": time.perf_counter() - started}
        return Rollout(groups, weights_version, self._source.state(), metrics, timings)

    def _generate(self, step: int, label: str) -> tuple[list[SampleGroup], dict[str, Metric]]:
        metrics: dict[str, Metric] = {}
        if self._teacher is not None:
            self._teacher.begin_rollout(step)
        with Progress(label, self._config.samples_per_rollout, unit="samples") as progress:
            groups, num_rejected = self._groups(self._count(progress))
        if num_rejected is not None:
            metrics["rollout/groups_left_out"] = Replicated(num_rejected)
        samples = [sample for group in groups for sample in group.samples]
        num_failed = sum(bool(sample.values.get("teacher_failed", [0.0])[0]) for sample in samples)
        reason = None if self._teacher is None else self._teacher.teacher.latest_failure
        limit = self._config.opd.opd_max_fallback_fraction
        check_fallback(num_failed, self._config.samples_per_rollout, limit, reason)
        if self._teacher is not None:
            metrics |= self._teacher.end_rollout(samples)
        return groups, metrics

    def _groups(self, on_sample: OnSample) -> tuple[list[SampleGroup], int | None]:
        """The groups of one rollout, and how many dynamic sampling rejected; None without it."""
        options, generator = self._config.rollout, self._generator
        if self._accept is None:
            prompts = self._source.take(options.rollout_batch_size)
            return self._loop.run(generator.generate(prompts, on_sample)), None
        return self._loop.run(
            sample_until_accepted(
                generator.generate_group,
                self._source.take,
                self._accept,
                num_groups=options.rollout_batch_size,
                prompts_per_request=options.over_sampling_batch_size or options.rollout_batch_size,
                on_group=lambda group: [on_sample(sample) for sample in group.samples],
            )
        )

    def evaluate(self, label: str) -> dict[str, Mean]:
        """The metrics of every evaluation set."""
        config, sets = self._config, self._eval_sets
        total = sum(len(eval_set.prompts) for eval_set in sets) * config.evaluation.n_samples_per_eval_prompt
        with Progress(label, total, unit="samples") as progress:
            on_sample = self._count(progress)
            return self._loop.run(evaluate(self._client, self._tokenizer, config, sets, self._eval_reward, on_sample))

    def _count(self, progress: Progress) -> OnSample:
        """A callback that advances `progress` by one sample and its tokens."""

        def count(sample: Sample) -> None:
            progress.advance(1, tokens=sample.response_length)
            self._on_sample(sample)

        return count

    def close(self) -> None:
        """Close the connections, and end the processes of the rewards."""
        if self._client is not None:
            self._loop.run(self._generator.aclose())
            self._loop.run(self._client.aclose())
        for reward in (self._reward, self._eval_reward):
            if reward is not None:
                reward.close()


def student_client(config: Config, url: str, api_key: str | None) -> EngineClient:
    """A client of the student's engines at `url`, their one address."""
    rollout = config.rollout
    return EngineClient(
        url,
        concurrency=rollout.sglang_server_concurrency * config.num_engines,
        timeout_s=rollout.rollout_request_timeout_s,
        retries=rollout.rollout_request_retries,
        api_key=api_key,
        vocabulary_size=language_model(read_hf_config(config.model.hf_checkpoint)).get("vocab_size"),
    )
