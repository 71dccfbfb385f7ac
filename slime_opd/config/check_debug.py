"""Rules between options: recorded rollouts, and runs that only generate or only train."""

from __future__ import annotations

from slime_opd.config.config import Config
from slime_opd.config.paths import names_each_rollout


def check_debug(config: Config) -> list[str]:
    """Paths that do not name a file for each rollout, and runs that would neither generate nor train."""
    debug = config.debug
    paths = {
        "--save-debug-rollout-data": debug.save_debug_rollout_data,
        "--load-debug-rollout-data": debug.load_debug_rollout_data,
    }
    problems = [
        f"{flag}: found {path!r}, expected a path with {{rollout_id}} in it and no other braces, such as rollouts/{{rollout_id}}.parquet"
        for flag, path in paths.items()
        if path is not None and not names_each_rollout(path)
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
