"""What a resumed run does about an option that differs from the checkpoint's: honours or refuses it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OnResume:
    """`effect`: the report. With `of_optimizer_state` a change is refused only if the optimizer's state is loaded."""

    effect: str
    is_refused: bool = False
    of_optimizer_state: bool = False
    is_compared: bool = True


HONOURED = OnResume("honoured")
NEXT_STEP = OnResume("honoured from the next step")
LR_SCHEDULE = OnResume("honoured from the next step; the schedule keeps its position")
BATCH_SIZE = OnResume("honoured; schedules count optimizer steps")
RUN_LENGTH = OnResume("honoured; schedules over the whole run are stretched to it")
COMPARED_SHAPES = OnResume("honoured; shapes are compared when the weights are loaded")
SAME_PROMPTS = OnResume("honoured, if it gives the same prompts")
NO_EFFECT = OnResume("has no effect in any run")
# Which checkpoint is loaded is reported by itself.
START = OnResume("chooses the start", is_compared=False)

ARCHITECTURE = OnResume(
    "the model would be another: set it back, or start at step 0 from the weights with --finetune", is_refused=True
)
PROMPT_ORDER = OnResume(
    "the order of the prompts would change: set it back, or start at step 0 with --finetune", is_refused=True
)
LOSS = OnResume(
    "the run would be another: give another --save, and start from these weights with --load and --finetune",
    is_refused=True,
)
_AFRESH = "set it back, or start its state afresh with --no-load-optim"
PRECISION = OnResume(f"the optimizer's state is of that precision: {_AFRESH}", is_refused=True, of_optimizer_state=True)
OPTIMIZER = OnResume(f"the saved state is another optimizer's: {_AFRESH}", is_refused=True, of_optimizer_state=True)
LOSS_SCALE = OnResume(
    f"the loss scale continues from the checkpoint: {_AFRESH}", is_refused=True, of_optimizer_state=True
)
RANDOM_STATE = OnResume(
    "the random state continues from the checkpoint: set it back, or start at step 0 with --finetune",
    is_refused=True,
    of_optimizer_state=True,
)
