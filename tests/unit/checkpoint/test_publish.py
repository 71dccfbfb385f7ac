"""Publishing a checkpoint: a kill at any point leaves a complete one, and only old ones are removed."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from tiny_checkpoint import write_checkpoint, write_run

from slime_opd.checkpoint.directory import TRACKER, find
from slime_opd.checkpoint.location import iterations
from slime_opd.checkpoint.publish import publish, remove_old
from slime_opd.checkpoint.whole import problems_of


@pytest.fixture
def run(tmp_path):
    """A run's checkpoints of steps 2, 4 and 6."""
    return write_run(tmp_path / "run", 2, 4, 6)


def partial(root, step) -> object:
    return write_checkpoint(root / f"iter_{step:07d}.partial", step)


def test_a_checkpoint_that_is_published_is_found_and_leaves_nothing_partial(run):
    assert publish(partial(run, 8)) == run / "iter_0000008"
    assert find(str(run)).iteration == 8
    assert not list(run.glob("*.partial")) and not list(run.glob("*.replaced"))


def test_a_kill_at_any_point_of_publishing_leaves_a_whole_checkpoint_to_find(run, monkeypatch):
    """The same step is written again, and the process ends before, between or after each change to the directory."""
    count = 0

    class Killed(BaseException):
        pass

    def counted(function):
        def call(*arguments, **named):
            nonlocal count
            count += 1
            if count == limit:
                raise Killed
            return function(*arguments, **named)

        return call

    for limit in range(1, 8):
        root = run.parent / f"killed{limit}"
        shutil.copytree(run, root)
        written = partial(root, 6)
        count = 0
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", counted(Path.rename))
            patched.setattr(shutil, "rmtree", counted(shutil.rmtree))
            with contextlib.suppress(Killed):
                publish(written)
        found = find(str(root))
        assert found.iteration == 6 and problems_of(found) == [], limit
        again = root / "iter_0000006.partial"
        shutil.rmtree(again, ignore_errors=True)
        assert publish(partial(root, 6)) == root / "iter_0000006" and not list(root.glob("*.replaced"))
    assert count < limit  # the last round was not killed


def test_the_tracked_checkpoint_and_later_steps_are_not_removed(run):
    (run / TRACKER).write_text("4")
    remove_old(run, 1)
    assert list(iterations(run)) == [4, 6]
    (run / TRACKER).write_text("6")
    remove_old(run, 0)
    assert list(iterations(run)) == [4, 6]
    remove_old(run, 1)
    assert list(iterations(run)) == [6]


def test_files_are_on_the_disk_before_the_tracker_names_them(run, monkeypatch):
    order = []
    real = os.fsync

    def fsync(descriptor):
        order.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{run}/"))
        real(descriptor)

    written = partial(run, 8)
    monkeypatch.setattr(os, "fsync", fsync)
    publish(written)
    files = [f"iter_0000008.partial/{path.name}" for path in (run / "iter_0000008").iterdir()]
    assert set(files) == set(order[: len(files)])
    assert order[len(files) :] == ["iter_0000008.partial", str(run), f"{TRACKER}.partial", str(run)]
