"""Rules about recorded rollouts, and about runs that do one half of the work."""

from __future__ import annotations

from pathlib import Path

from slime_opd.config.config import Config


def check_debug(config: Config) -> list[str]:
    """Paths that name no file per rollout, and halves that leave nothing to do."""
    debug = config.debug
    paths = {
        "--save-debug-rollout-data": debug.save_debug_rollout_data,
        "--load-debug-rollout-data": debug.load_debug_rollout_data,
    }
    problems = [
        f"{flag}: found {path!r}, expected a path with {{rollout_id}} in it and no other braces, such as rollouts/{{rollout_id}}.parquet"
        for flag, path in paths.items()
        if path is not None and not _names_each_rollout(path)
    ]
    if debug.debug_rollout_only:
        others = {
            "--load-debug-rollout-data": debug.load_debug_rollout_data,
            "--debug-train-only": debug.debug_train_only,
            "--loss-type sft_loss": config.is_sft,
        }
        problems += [
            f"--debug-rollout-only with {flag}: nothing would be done" for flag, value in others.items() if value
        ]
    if debug.debug_train_only and not (config.is_sft or config.replays):
        problems.append(
            "--debug-train-only: found nothing to train on, expected --load-debug-rollout-data with recorded rollouts"
        )
    if config.replays and config.rollout.num_rollout is None and config.data.num_epoch is not None:
        problems.append("--num-epoch counts prompts, which a replay does not read: give --num-rollout")
    if config.replays and debug.save_debug_rollout_data is not None:
        problems.append("--save-debug-rollout-data with --load-debug-rollout-data: the rollouts are recorded already")
    return problems


def check_recordings_exist(config: Config) -> list[str]:
    """No recording at all. Which are missing depends on where the run starts, and is reported once that is known."""
    path = config.debug.load_debug_rollout_data
    if path is None or not _names_each_rollout(path):
        return []
    numbers = range(1, (config.rollout.num_rollout or 0) + 1)
    if not numbers or any(Path(path.format(rollout_id=number)).is_file() for number in numbers):
        return []
    return [f"--load-debug-rollout-data: found no file of {path} for any rollout from 1 to {len(numbers)}"]


def _names_each_rollout(path: str) -> bool:
    try:
        return path.format(rollout_id=1) != path.format(rollout_id=2)
    except (KeyError, IndexError, ValueError, AttributeError):
        return False
