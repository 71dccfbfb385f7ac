"""The training loop, and its command: `python -m slime_opd.train FLAGS`, alone or under `ray job submit`.

`--help` lists the flags by purpose.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, NoReturn

from slime_opd import lifetimes
from slime_opd.cluster import private_cluster
from slime_opd.config.parser import command_line, parse
from slime_opd.config.paths import with_absolute_paths
from slime_opd.preflight.rules import notes, validate
from slime_opd.stopping import Stopping

if TYPE_CHECKING:
    from slime_opd.cluster.run import Run
    from slime_opd.config import Config


def train(run: Run) -> None:
    """Generate and train every rollout, log its metrics, and save and evaluate where that is due."""
    config = run.config
    if config.evaluates and not (config.evaluation.skip_eval_before_train or run.first_step):
        run.log(0, run.evaluate(0))
    for step in run.steps:
        done = step + 1
        rollout = run.generate(step)
        # Logged before the checkpoint: a run killed between the two repeats the step, and no step is without metrics.
        run.log(done, run.train(step, rollout))
        if reason := run.save_reason(done):
            run.save(done, reason)
        if config.evaluates and is_evaluation_due(done, config):
            run.log(done, run.evaluate(done))


def is_evaluation_due(done: int, config: Config) -> bool:
    """Whether an evaluation is due after `done` rollouts: every --eval-interval, and after the last."""
    interval = config.evaluation.eval_interval
    return done == config.rollout.num_rollout or (interval is not None and done % interval == 0)


def check(argv: list[str]) -> NoReturn:
    """Print the findings about the run that `argv` describes, and exit; the code is 2 where there is a problem."""
    from slime_opd.preflight import check as preflight

    sys.exit(preflight.check(argv))


def main(argv: list[str]) -> None:
    """Check the command line, read the data, start the run and train; with --check, only check everything."""
    if "--check" in argv:
        check([argument for argument in argv if argument != "--check"])
    config = parse(argv)
    validate(config)
    config = with_absolute_paths(config)
    from slime_opd.preflight.check import require_ready

    require_ready(config)
    saves = config.checkpoint.save is not None and not config.debug.debug_rollout_only
    stopping = Stopping(grace_s=config.checkpoint.exit_grace_s, saves=saves)
    stopping.install()
    lifetimes.own()
    lifetimes.leave_last_words("it was still starting: nothing was trained yet")
    private_cluster.prepare_environment(config.cluster.ray_address)
    # Heavy imports come after the checks: a wrong flag is reported at once, without importing Ray.
    from slime_opd.cluster import deaths
    from slime_opd.cluster.run import Run
    from slime_opd.observe import console
    from slime_opd.preflight.inputs import load_inputs

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for note in notes(config):
        console.say(note)
    run = None
    try:
        inputs = load_inputs(config)
        run = Run(config, inputs.tokenizer, inputs.source, inputs.eval_sets, stopping)
        with stopping, run:
            train(run)
    except Exception as error:
        log, activity = (None, None) if run is None else (run.log_dir / "traceback.log", run.watchdog.failed_in)
        sys.exit(deaths.exit_message(error, log, activity))


if __name__ == "__main__":
    command_line(main)
