"""The checkpoints of a run, on the driver: the checkpoint it starts from, when it saves, and which ones it keeps."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slime_opd.checkpoint import aside, differences, directory, saves
from slime_opd.checkpoint.record import identity_of, public_values, run_record
from slime_opd.checkpoint.start import choose_start, read_facts, request_of
from slime_opd.config import Config
from slime_opd.data.source import PromptSource
from slime_opd.errors import CheckpointError, ConfigError
from slime_opd.observe import console

if TYPE_CHECKING:
    from slime_opd.cluster.trainers import TrainerGroup


class RunCheckpoints:
    """Chooses the starting checkpoint, before any process runs; later saves the trainers' state."""

    def __init__(self, config: Config, source: PromptSource | None) -> None:
        """Raises ConfigError if no start is possible, or an option differs from the checkpoint's that must not."""
        self._config, self._source = config, source
        self._root = Path(config.checkpoint.save) if config.checkpoint.save else None
        if self._root is not None and self._root.is_dir():
            aside.finish_set_aside(self._root)
        self._request = request_of(config)
        self._identity = identity_of(config, {} if source is None else source.identity())
        self.start = choose_start(self._request, read_facts(self._request, self._identity))
        self.policy = saves.save_policy(config)
        self.latest: str | None = None
        self._saved_step, self._saved_at = None, time.monotonic()
        # The trainers' configuration: its --load is the chosen checkpoint.
        self.trainer_config = self.start.resolve(config)
        # The driver's state in the checkpoint that the run resumes from; {} for a new run.
        self.run_state: dict[str, Any] = {}
        if self.start.outcome.continues:
            self.run_state = directory.read_run_state(directory.require(self.start.path, self.start.flag))
            self._continue(self.run_state)
        else:
            console.say(f"training starts from {self.start.flag} {self.start.path}")

    def _continue(self, run_state: dict[str, Any]) -> None:
        start, source = self.start, self._source
        if source is None and not self._config.replays:
            raise ConfigError(f"{start.flag} {start.path} has a position in the prompts, but --prompt-data is missing")
        saved = run_state.get("run", {}).get("options")
        replayed = self._config.debug.load_debug_rollout_data
        if start.flag == "--save" and saved is not None and saved.get("load_debug_rollout_data") != replayed:
            raise ConfigError(
                f"--save {start.path} is of a run "
                f"{'that generated its rollouts' if replayed else 'that replayed recorded rollouts'}: "
                "give this run another --save, and --load to start from that checkpoint"
            )
        changed = differences.differences(saved, public_values(self._config)) if saved is not None else []
        if changed:
            console.say("options that differ from the checkpoint's:\n  " + "\n  ".join(differences.table(changed)))
        if problems := differences.refusals(changed):
            raise ConfigError("\n".join(problems))
        prompts = run_state.get("prompts", {})
        try:
            if source is not None:
                source.load_state(prompts)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        console.say(
            f"resumed {start.flag} {start.path} at rollout {start.step + 1} "
            f"(epoch {prompts['epoch']}, prompt {prompts['offset']}): the run {start.outcome.value.replace('`', '')}"
        )
        if start.flag == "--save":
            self.latest, self._saved_step = start.path, start.step
        if saved is not None and saved.get("no_save_optim") and not self._config.checkpoint.no_load_optim:
            console.warn("the checkpoint was saved with --no-save-optim: the optimizer's state is initialised anew")
            options = dataclasses.replace(self.trainer_config.checkpoint, no_load_optim=True)
            self.trainer_config = dataclasses.replace(self.trainer_config, checkpoint=options)

    def begin(self, trainers: TrainerGroup) -> None:
        """Prepare --save for the first new checkpoint. Call it after the trainers have loaded theirs."""
        self._saved_at = time.monotonic()
        if self._root is None or not self._root.is_dir() or self.start.step >= self.policy.total:
            return
        moved = aside.set_aside(self._root, self.start.newest_kept)
        if moved is not None:
            steps = ", ".join(map(str, aside.complete_steps(moved)))
            console.say(f"set aside: the checkpoints of steps {steps} are now in {moved}")
        if self.latest is not None:
            # The run may have been killed after the checkpoint, but before its Hugging Face copy.
            self._save_hugging_face(trainers, self.start.step, self.latest, is_missing=True)

    def reason(self, done: int) -> str | None:
        """The reason for a checkpoint after `done` rollouts; None if none is due."""
        if self._root is None:
            return None
        return self.policy.reason(done, time.monotonic() - self._saved_at)

    def save(self, trainers: TrainerGroup, run_state: dict[str, Any], reason: str) -> str:
        """Write the checkpoint of `run_state["step"]`, unless it exists; returns its directory."""
        step = run_state["step"]
        if step == self._saved_step:
            return str(self.latest)
        record = run_record(self._config, self._request, self._identity, reason)
        self.latest = trainers.save(step, {**run_state, "run": record})
        self._saved_step, self._saved_at = step, time.monotonic()
        # A run that a signal ends has only seconds left; the restart writes the Hugging Face copy.
        if reason != saves.BY_REQUEST:
            self._save_hugging_face(trainers, step, self.latest)
        self._remove_superfluous()
        return self.latest

    def _save_hugging_face(
        self, trainers: TrainerGroup, step: int, checkpoint: str, *, is_missing: bool = False
    ) -> None:
        template = self._config.checkpoint.save_hf
        if template is None:
            return
        path = template.format(rollout_id=step)
        if is_missing and Path(path).exists():
            return
        trainers.save_hugging_face(checkpoint, path)
        console.say(f"saved {path} for Hugging Face")

    def _remove_superfluous(self) -> None:
        root = self._root
        if self._config.checkpoint.keep_checkpoints or root is None:
            return
        made_by = {step: _made_by(aside.iteration_path(root, step)) for step in aside.complete_steps(root)}
        for step in saves.superfluous(made_by, aside.latest_step(root)):
            shutil.rmtree(aside.iteration_path(root, step))


def _made_by(iteration: Path) -> str | None:
    """The reason for which a checkpoint was written; None if it is not recorded (such a checkpoint is kept)."""
    try:
        return json.loads((iteration / directory.RUN_STATE).read_text()).get("run", {}).get("made_by")
    except (OSError, ValueError):
        return None
