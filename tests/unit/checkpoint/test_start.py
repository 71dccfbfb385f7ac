"""Where a run starts from: the table on every combination of its columns, and on directories of real runs."""

from __future__ import annotations

import dataclasses
import json
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_opd.checkpoint import aside, directory
from slime_opd.checkpoint.directory import Location
from slime_opd.checkpoint.record import run_record
from slime_opd.checkpoint.start import (
    Contents,
    Facts,
    Request,
    Start,
    choose_start,
    loaded_kind,
    read_facts,
    request_of,
    saved_kind,
)
from slime_opd.checkpoint.start_table import (
    MEANINGS,
    RULES,
    Loaded,
    Outcome,
    Saved,
    meanings_as_markdown,
    rules_as_markdown,
)
from slime_opd.config import Config
from slime_opd.config.stages import CheckpointConfig, ModelConfig
from slime_opd.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parents[3]
IDENTITY = {"loss_type": "sft_loss", "prompts": {"rows": 3, "fingerprint": "f"}}


def test_the_page_has_the_table_that_the_code_reads():
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    assert rules_as_markdown() in page
    assert meanings_as_markdown() in page
    assert MEANINGS.keys() == {kind.value for kind in Saved}


def request_for(**given) -> Request:
    absent = Request("/save", None, False, None, False, None, None, "/hf")
    return dataclasses.replace(absent, **given)


ALL_REQUESTS = [
    request_for(ckpt_step=step, finetune=finetune, ref_load=reference)
    for step, finetune, reference in product((None, 0, 4), (False, True), (None, "/reference"))
]


@pytest.mark.parametrize("request_", ALL_REQUESTS)
def test_every_combination_has_one_outcome(request_):
    for saved, loaded in product(Saved, Loaded):
        assert any(rule.matches(request_, saved, loaded) for rule in RULES)


def test_every_row_applies_to_some_case():
    deciding = {
        next(index for index, rule in enumerate(RULES) if rule.matches(request_, saved, loaded))
        for request_, saved, loaded in product(ALL_REQUESTS, Saved, Loaded)
    }
    assert deciding == set(range(len(RULES)))


# --- Directories ---------------------------------------------------------------------------------------------------


def config_of(save: Path | None = None, **options) -> Config:
    paths = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    hf_checkpoint = paths.pop("hf_checkpoint", "hf")
    checkpoint = CheckpointConfig(save=None if save is None else str(save), **paths)
    return Config(model=ModelConfig(hf_checkpoint=hf_checkpoint), checkpoint=checkpoint)


def write(
    root: Path, step: int, config: Config | None = None, identity=IDENTITY, run_state: dict | None = None
) -> None:
    """A checkpoint of `step` as a run with this configuration writes it."""
    path = aside.iteration_path(root, step)
    path.mkdir(parents=True)
    (path / ".metadata").touch()
    if config is not None:
        run_state = {"step": step, "run": run_record(config, request_of(config), identity, "interval")}
    if run_state is not None:
        (path / "run_state.json").write_text(json.dumps(run_state))
    (root / directory.TRACKER).write_text(str(step))


def start(config: Config, identity=IDENTITY) -> Start:
    request = request_of(config)
    return choose_start(request, read_facts(request, identity))


def begin(config: Config, root: Path, identity=IDENTITY) -> Start:
    """The steps of a run: choose the start, then set aside checkpoints that the first save would overwrite."""
    aside.finish_set_aside(root)
    chosen = start(config, identity)
    aside.set_aside(root, chosen.newest_kept)
    return chosen


def steps_of(root: Path) -> list[int]:
    return aside.complete_steps(root)


def test_a_first_run_starts_from_the_model_and_a_reference_wins_over_it(tmp_path):
    save = tmp_path / "save"
    first = start(config_of(save))
    assert (first.outcome, first.flag, first.step) == (Outcome.WEIGHTS_OF_HUGGING_FACE, "--hf-checkpoint", 0)
    assert start(config_of(save, ref_load="reference")).flag == "--ref-load"
    # What --load will be, once there is something.
    assert start(config_of(save, load=save, ref_load="reference")).flag == "--ref-load"


@pytest.mark.parametrize("load", [False, True], ids=["without --load", "with --load SAVE"])
def test_the_same_command_resumes_from_the_newest(tmp_path, load):
    config = config_of(tmp_path, load=tmp_path if load else None)
    write(tmp_path, 2, config)
    write(tmp_path, 4, config)
    continued = start(config)
    assert (continued.outcome, continued.step) == (Outcome.CONTINUE_NEWEST, 4)
    resolved = continued.resolve(config).checkpoint
    assert (resolved.load, resolved.ckpt_step, resolved.finetune) == (str(tmp_path / "iter_0000004"), None, False)


def test_load_and_no_load_of_the_save_directory_are_the_same_command(tmp_path):
    write(tmp_path, 2, config_of(tmp_path))
    assert start(config_of(tmp_path, load=tmp_path)).step == 2


@pytest.mark.parametrize(
    "flags", [{"finetune": True}, {"ckpt_step": 3}, {"finetune": True, "ckpt_step": 3}, {"ref_load": "reference"}]
)
def test_a_start_from_elsewhere_happens_once(tmp_path, flags):
    save, other = tmp_path / "save", tmp_path / "other"
    for step in (3, 9):
        write(other, step, config_of(other))
    config = config_of(save, load=other, **flags)
    first = start(config)
    assert Path(first.path).parent == other
    assert first.outcome.continues is not flags.get("finetune", False)
    write(save, 5, config)
    again = start(config)
    assert (again.outcome, again.flag, again.step) == (Outcome.CONTINUE_NEWEST, "--save", 5)


def test_an_empty_load_directory_is_skipped(tmp_path):
    assert start(config_of(tmp_path / "save", load=tmp_path / "nothing")).flag == "--hf-checkpoint"


@pytest.mark.parametrize(
    ("written", "now", "identity", "reason"),
    [
        ({"load": "a"}, {}, IDENTITY, "--load was"),
        ({}, {"hf_checkpoint": "other"}, IDENTITY, "--hf-checkpoint was"),
        ({}, {"ref_load": "r"}, IDENTITY, "--ref-load was not given"),
        ({}, {}, {**IDENTITY, "prompts": {"rows": 4, "fingerprint": "g"}}, "on other prompts"),
        ({}, {}, {**IDENTITY, "loss_type": "policy_loss"}, "with another --loss-type"),
    ],
)
def test_another_runs_checkpoints_are_refused_with_the_alternatives(tmp_path, written, now, identity, reason):
    write(tmp_path, 2, config_of(tmp_path, **written))
    with pytest.raises(ConfigError) as caught:
        start(config_of(tmp_path, **now), identity)
    message = str(caught.value)
    assert reason in message and "give another --save" in message and f"--load {tmp_path}" in message
    # Both ways out are ways.
    assert start(config_of(tmp_path / "another", **now), identity).step == 0
    assert start(config_of(tmp_path, **{**now, "load": tmp_path}), identity).step == 2
    over = start(config_of(tmp_path, **{**now, "load": tmp_path, "finetune": True}), identity)
    assert over.outcome is Outcome.WEIGHTS_OF_SAVE


def test_checkpoints_of_an_older_version_are_resumed_with_load(tmp_path):
    write(tmp_path, 2, run_state={"step": 2, "prompts": {}})
    assert start(config_of(tmp_path, load=tmp_path)).step == 2
    with pytest.raises(ConfigError, match="is not recorded"):
        start(config_of(tmp_path))


def test_iterations_without_run_state_give_weights_only(tmp_path):
    write(tmp_path, 7)
    with pytest.raises(ConfigError, match="--finetune"):
        start(config_of(tmp_path, load=tmp_path))
    with pytest.raises(ConfigError, match="not this run's"):
        start(config_of(tmp_path))
    with pytest.raises(ConfigError, match="--finetune"):
        start(config_of(tmp_path / "save", load=tmp_path))
    taken = start(config_of(tmp_path / "save", load=tmp_path, finetune=True))
    assert (taken.outcome, taken.step) == (Outcome.WEIGHTS_OF_LOAD, 0)


def test_a_release_in_the_save_directory_is_loaded_and_kept(tmp_path):
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / ".metadata").touch()
    (tmp_path / directory.TRACKER).write_text("release")
    with pytest.raises(ConfigError, match="to start from them"):
        start(config_of(tmp_path))
    config = config_of(tmp_path, load=tmp_path)
    first = begin(config, tmp_path)
    assert (first.outcome, first.path, first.step) == (Outcome.WEIGHTS_OF_LOAD, str(tmp_path / "release"), 0)
    assert (tmp_path / directory.TRACKER).read_text() == "release"
    write(tmp_path, 2, config)
    assert start(config).step == 2


def test_checkpoints_without_a_tracker_file_are_never_started_over(tmp_path):
    write(tmp_path, 2, config_of(tmp_path))
    (tmp_path / directory.TRACKER).unlink()
    with pytest.raises(CheckpointError, match=directory.TRACKER):
        start(config_of(tmp_path))


@pytest.mark.parametrize("by_directory", [False, True])
def test_an_older_step_sets_later_ones_aside_and_later_resumes_from_its_own(tmp_path, by_directory):
    first = config_of(tmp_path)
    for step in (2, 4, 6):
        write(tmp_path, step, first)
    back = config_of(tmp_path, load=tmp_path / "iter_0000002") if by_directory else config_of(tmp_path, ckpt_step=2)
    for _ in range(2):  # killed before it saved, it does the same again
        chosen = begin(back, tmp_path)
        assert (chosen.outcome, chosen.step, steps_of(tmp_path)) == (Outcome.CONTINUE_STEP, 2, [2])
    (moved,) = aside.aside_directories(tmp_path)
    assert steps_of(moved) == [4, 6] and directory.find(str(moved)).iteration == 6
    write(tmp_path, 4, back)
    assert begin(back, tmp_path).step == 4
    # The first command continues what is there now.
    assert begin(first, tmp_path).step == 4
    assert steps_of(moved) == [4, 6]


def test_a_missing_step_is_an_error_that_lists_the_existing_steps(tmp_path):
    write(tmp_path, 2, config_of(tmp_path))
    with pytest.raises(ConfigError, match=r"--ckpt-step 3.*existing steps: 2"):
        start(config_of(tmp_path, ckpt_step=3))


def test_an_older_step_can_be_chosen_if_the_newest_is_damaged(tmp_path, monkeypatch):
    for step in (2, 4):
        write(tmp_path, step, config_of(tmp_path))
    find = directory.find

    def damaged(path: str, step: int | None = None, *, flag: str):
        if step is None:
            raise CheckpointError("iter_0000004 is damaged: give --ckpt-step 2")
        return find(path, step, flag=flag)

    monkeypatch.setattr(directory, "find", damaged)
    with pytest.raises(CheckpointError, match="damaged"):
        start(config_of(tmp_path))
    assert start(config_of(tmp_path, ckpt_step=2)).step == 2


def test_a_tracker_file_that_a_user_set_back_is_used_and_later_steps_are_set_aside(tmp_path):
    config = config_of(tmp_path, ckpt_step=2)
    for step in (2, 4, 6):
        write(tmp_path, step, config)
    (tmp_path / directory.TRACKER).write_text("4")
    assert begin(config, tmp_path).step == 4
    assert steps_of(tmp_path) == [2, 4]


def test_finetune_in_place_sets_everything_aside_and_a_kill_before_the_first_save_loses_nothing(tmp_path):
    write(tmp_path, 2, config_of(tmp_path))
    write(tmp_path, 4, config_of(tmp_path))
    over = config_of(tmp_path, load=tmp_path, finetune=True)
    assert begin(over, tmp_path).path == str(tmp_path / "iter_0000004")
    (moved,) = aside.aside_directories(tmp_path)
    assert steps_of(tmp_path) == [] and steps_of(moved) == [2, 4]
    again = begin(over, tmp_path)
    assert (again.outcome, again.path, again.step) == (Outcome.WEIGHTS_OF_ASIDE, str(moved), 0)
    # Without --finetune it would start from the model, with the weights out of sight.
    with pytest.raises(ConfigError, match=f"--load {moved}"):
        start(config_of(tmp_path))
    write(tmp_path, 2, over)
    assert begin(over, tmp_path).step == 2


def test_an_interrupted_set_aside_is_finished_by_the_next_start(tmp_path, monkeypatch):
    first = config_of(tmp_path)
    for step in (2, 4, 6):
        write(tmp_path, step, first)
    moves = 0
    rename = Path.rename

    def killed_after_one(self, target):
        nonlocal moves
        moves += 1
        if moves > 1:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_after_one)
        with pytest.raises(KeyboardInterrupt):
            aside.set_aside(tmp_path, 2)
    assert begin(config_of(tmp_path, ckpt_step=2), tmp_path).step == 2
    (moved,) = aside.aside_directories(tmp_path)
    assert (steps_of(tmp_path), steps_of(moved)) == ([2], [4, 6])


@settings(deadline=None)
@given(
    held=st.sampled_from(("nothing", "own", "other", "old", "foreign", "weights", "aside")),
    load=st.sampled_from((None, "/save", "/load")),
    elsewhere=st.sampled_from(("nothing", "run", "foreign", "weights")),
    step=st.sampled_from((None, 2)),
    finetune=st.booleans(),
)
def test_a_start_never_ignores_what_save_holds(held, load, elsewhere, step, finetune):
    request = request_for(load=load, loads_save=load == "/save", ckpt_step=step, finetune=finetune)
    written = request_for(load="/elsewhere") if held == "other" else request
    run_state = {"run": {"request": written.recorded(), "identity": IDENTITY}}
    location = Location(Path("/save/iter_0000004"), 4)
    save = {
        "nothing": Contents(),
        "own": Contents(location, run_state, (2, 4)),
        "other": Contents(location, run_state, (2, 4)),
        "old": Contents(location, {"step": 4}, (2, 4)),
        "foreign": Contents(location, None, (2, 4)),
        "weights": Contents(Location(Path("/save/release"), None)),
        "aside": Contents(aside="/save/aside_1_d"),
    }[held]
    other = Location(Path("/load/iter_0000002"), 2)
    loaded = {
        "nothing": Contents(),
        "run": Contents(other, {"step": 2}, (2,)),
        "foreign": Contents(other, None, (2,)),
        "weights": Contents(Location(Path("/load"), None, is_hugging_face=True)),
    }[elsewhere]
    facts = Facts(save, loaded if load == "/load" else Contents(), IDENTITY)
    try:
        chosen = choose_start(request, facts)
    except ConfigError as refusal:
        assert held != "nothing" or elsewhere == "foreign"
        assert "--" in str(refusal)
        return
    if held == "own":
        assert (chosen.path, chosen.step) == ("/save/iter_0000004", 4)
    elif held == "aside" and load != "/load":
        assert finetune and chosen.path == "/save/aside_1_d"
    elif held != "nothing" and held != "aside":
        # Whoever does not use them is refused.
        assert load == "/save" and chosen.path.startswith("/save/")
    assert chosen.step == 0 or chosen.outcome.continues
    assert saved_kind(request, facts) in Saved and loaded_kind(request, facts) in Loaded
