"""Checkpoints of a real trainer on two ranks: damaged ones are refused on both together, foreign code in one is never run, and a
failure to write leaves the one before it.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from ranks import run_ranks
from rollouts import train
from test_objective_layouts import make_config, make_samples

pytestmark = pytest.mark.dist


class Payload:
    """An object that would make a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Laboratory:
    """A trainer on each rank, the checkpoints of steps 1 and 2 that it saved, and copies of step 2 to do harm to."""

    def __init__(self, rank, world_size, init_method, models, directory: str) -> None:
        import dataclasses

        from slime_opd.checkpoint import whole
        from slime_opd.trainer.trainer import Trainer

        # Large files are not read by a short look: leave all to the ranks.
        whole._SMALL_BYTES = 0
        self.rank, self.directory, self.root = rank, Path(directory), Path(directory) / "saved"
        config = make_config(*models, world_size, 2, 1)
        options = dataclasses.replace(config.checkpoint, save=str(self.root))
        self.trainer = Trainer(
            dataclasses.replace(config, checkpoint=options), rank=rank, world_size=world_size, init_method=init_method
        )
        for step in (1, 2):
            train(self.trainer, make_samples())
            self.trainer.save(step, {"step": step})

    def copy_with(self, harm) -> Path:
        """A copy of the checkpoints in which rank 0 has done `harm` to the directory of step 2."""
        import torch.distributed as dist

        root = self.directory / "copy"
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(self.root, root)
            harm(root / "iter_0000002")
        dist.barrier()
        return root

    def load(self, root: Path, *, verify: bool = True) -> str:
        """What loading the newest checkpoint of `root` raises; "loaded" where it raises nothing."""
        from slime_opd.checkpoint import directory
        from slime_opd.errors import CheckpointError
        from slime_opd.checkpoint.formats.load import load_training_state, load_weights
        from slime_opd.checkpoint.formats.verification import Verification

        trainer = self.trainer
        try:
            location = directory.require(str(root), "--load")
            verification = Verification(enabled=verify)
            verification.require(location, "--load")
            directory.read_run_state(location)
            load_weights(trainer.model, trainer.bridge, location, "--load")
            load_training_state(trainer._training_state(), location)
        except CheckpointError as error:
            return str(error).replace(str(root), "ROOT")
        return "loaded" + "".join(verification.warnings).replace(str(root), "ROOT")

    def save(self, step: int) -> str:
        from slime_opd.errors import CheckpointError

        try:
            return str(self.trainer.save(step, {"step": step}))
        except CheckpointError as error:
            left = [path.name for path in self.root.glob("*.partial")] if self.rank == 0 else []
            return str(error).replace(str(self.root), "ROOT") + "".join(left)


def shard(directory: Path, number: int = 0) -> Path:
    """One of the files of tensors, the largest first."""
    return sorted(directory.glob("*.distcp"), key=lambda path: -path.stat().st_size)[number]


def flip(path: Path, at: int | None = None, count: int = 64) -> None:
    content = bytearray(path.read_bytes())
    start = len(content) // 2 if at is None else at
    content[start : start + count] = bytes(byte ^ 0xFF for byte in content[start : start + count])
    path.write_bytes(content)


def without_manifest(directory: Path) -> None:
    """Make a checkpoint look like one of Megatron-LM's."""
    (directory / "manifest.sha256").unlink()
    (directory / "run_state.json").write_text("{}")


def poisoned_metadata(directory: Path, payload: Payload) -> None:
    without_manifest(directory)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.planner_data = payload
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def poisoned_common(directory: Path, payload: Payload) -> None:
    import torch

    without_manifest(directory)
    torch.save({"iteration": payload}, directory / "common.pt")


def poisoned_rng(directory: Path, payload: Payload) -> None:
    """Put a payload into the first rank's random state, behind the tensors of its shard."""
    import io

    import torch

    without_manifest(directory)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    poison = io.BytesIO()
    torch.save(payload, poison)
    for index, info in metadata.storage_data.items():
        if index.fqn.startswith("rng/"):
            with (directory / info.relative_path).open("ab") as stream:
                info.offset, info.length = stream.tell(), poison.getbuffer().nbytes
                stream.write(poison.getbuffer())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def harms(laboratory: Laboratory) -> dict[str, tuple]:
    """What is done to step 2, by name: the harm, and whether checksums are compared."""
    payload = Payload(laboratory.directory / "payload-ran")
    return {
        "untouched": (lambda d: None, True),
        "64 bytes of a shard flipped": (lambda d: flip(shard(d)), True),
        "64 bytes of the smallest shard flipped": (lambda d: flip(shard(d, -1)), True),
        "a shard cut off": (lambda d: os.truncate(shard(d), 1000), True),
        "a shard cut off, checksums not compared": (lambda d: os.truncate(shard(d), 1000), False),
        "a shard zeroed": (lambda d: shard(d).write_bytes(bytes(shard(d).stat().st_size)), True),
        "a shard zeroed, checksums not compared": (lambda d: shard(d).write_bytes(bytes(shard(d).stat().st_size)), False),
        "a shard deleted": (lambda d: shard(d).unlink(), True),
        "no manifest": (lambda d: (d / "manifest.sha256").unlink(), True),
        "no manifest, checksums not compared": (lambda d: (d / "manifest.sha256").unlink(), False),
        "Megatron-LM's": (without_manifest, True),
        "common.pt flipped": (lambda d: flip(d / "common.pt"), True),
        "common.pt flipped, checksums not compared": (lambda d: flip(d / "common.pt", count=10**6), False),
        "code in .metadata": (lambda d: poisoned_metadata(d, payload), True),
        "code in common.pt": (lambda d: poisoned_common(d, payload), True),
        "code in a random state": (lambda d: poisoned_rng(d, payload), True),
    }


def fuzz(laboratory: Laboratory, seed: int, times: int) -> list[tuple[str, str]]:
    """Random damage to any file of step 2, and what loading it answers."""
    names = sorted(path.relative_to(laboratory.root / "iter_0000002").as_posix() for path in (laboratory.root / "iter_0000002").rglob("*") if path.is_file())  # fmt: skip
    draw, outcomes = random.Random(seed), []
    for _ in range(times):
        name, kind = draw.choice(names), draw.choice(["cut off", "flipped", "deleted", "zeroed"])
        at, size = draw.random(), (laboratory.root / "iter_0000002" / name).stat().st_size

        def harm(directory: Path, name=name, kind=kind, at=int(at * size), size=size) -> None:
            path = directory / name
            if kind == "cut off":
                os.truncate(path, at)
            elif kind == "flipped":
                flip(path, at, 1)
            elif kind == "deleted":
                path.unlink()
            else:
                path.write_bytes(bytes(size))

        outcomes.append((f"{name} {kind}", laboratory.load(laboratory.copy_with(harm))))
    return outcomes


def failures_to_write(laboratory: Laboratory, small_disk: str | None) -> dict[str, str]:
    """What saving step 3 answers where it cannot be written, by the cause."""
    from slime_opd.checkpoint import disk

    answers, real = {}, os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if laboratory.rank == 1:
        os.fsync = full  # Megatron's writers are forks of this process.
    answers["a writer of the second rank finds the disk full"] = laboratory.save(3)
    os.fsync = real
    check, disk.shutil.disk_usage = disk.shutil.disk_usage, lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
    answers["too little is free"] = laboratory.save(3)
    disk.shutil.disk_usage = check
    answers["there is room again"] = laboratory.save(3).replace(str(laboratory.root), "ROOT")
    if small_disk is not None:
        roots, laboratory.root = laboratory.root, Path(small_disk)
        import dataclasses

        config = laboratory.trainer.config
        laboratory.trainer.config = dataclasses.replace(
            config, checkpoint=dataclasses.replace(config.checkpoint, save=small_disk)
        )
        real_check, disk.check_free_space = disk.check_free_space, lambda *_: None
        answers["a full file system"] = laboratory.save(3)
        disk.check_free_space = real_check
        laboratory.root = roots
    return answers


def everything(rank, world_size, init_method, models, directory: str, small_disk: str | None):
    laboratory = Laboratory(rank, world_size, init_method, models, directory)
    loads = {
        name: laboratory.load(laboratory.copy_with(harm), verify=verify) for name, (harm, verify) in harms(laboratory).items()
    }
    fuzzed = fuzz(laboratory, seed=0, times=50)
    writes = failures_to_write(laboratory, small_disk)
    return loads, fuzzed, writes


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A file system of 200 KB; None where this user may mount none."""
    mount = tmp_path_factory.mktemp("small_disk")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", mount], capture_output=True, check=False)
    yield None if made.returncode else str(mount)
    if made.returncode == 0:
        subprocess.run(["umount", mount], check=True)


@pytest.fixture(scope="module")
def outcomes(tiny_model_dir, tmp_path_factory, small_disk):
    """Of both ranks: the answers to loading, to random damage and to failures to write; and the directory."""
    directory, rendezvous = tmp_path_factory.mktemp("laboratory"), tmp_path_factory.mktemp("rendezvous")
    models = (str(tiny_model_dir), str(tiny_model_dir))
    return run_ranks(everything, 2, rendezvous, models, str(directory), small_disk), directory


STEP_1 = "the newest earlier one that looks whole is step 1: --load ROOT --ckpt-step 1"


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        ("64 bytes of a shard flipped", ".distcp is damaged: its contents differ from their checksum in manifest.sha256"),
        ("64 bytes of the smallest shard flipped", ".distcp is damaged: its contents differ from their checksum in"),
        ("a shard cut off", ".distcp has 1,000 bytes, manifest.sha256 records "),
        ("a shard cut off, checksums not compared", ".distcp is cut off: it has 1,000 bytes, .metadata refers to "),
        ("a shard zeroed", ".distcp is damaged: its contents differ from their checksum"),
        ("a shard zeroed, checksums not compared", ": its contents are damaged; "),
        ("a shard deleted", ".distcp is missing"),
        ("no manifest", "manifest.sha256 is missing, although this checkpoint was written with one"),
        ("common.pt flipped", "common.pt is damaged"),
        ("common.pt flipped, checksums not compared", "common.pt"),
        ("code in .metadata", ".metadata names posix.system, which no checkpoint needs: reading it could run code"),
        ("code in common.pt", "common.pt: it names posix.system, which no checkpoint needs"),
        ("code in a random state", "it names posix.system, which no checkpoint needs"),
    ],
)
def test_a_damaged_checkpoint_is_refused_on_all_ranks_with_the_step_to_load_instead(outcomes, harm, expected):
    (first, second), _ = outcomes
    assert first[0][harm] == second[0][harm]
    assert first[0][harm].startswith("--load ROOT/iter_0000002: ") and expected in first[0][harm]
    assert first[0][harm].endswith(STEP_1) and "\n" not in first[0][harm]


def test_what_is_whole_is_loaded_and_what_cannot_be_verified_is_loaded_with_a_warning(outcomes):
    loads = outcomes[0][0][0]
    assert loads["untouched"] == "loaded"
    assert loads["Megatron-LM's"].startswith("loaded--load ROOT/iter_0000002 has no manifest.sha256, so that its contents")
    assert loads["no manifest, checksums not compared"].endswith("not verified, because of --no-verify-checkpoint")


def test_code_in_a_checkpoint_is_not_run(outcomes):
    assert not (outcomes[1] / "payload-ran").exists()


def test_no_random_damage_is_loaded_or_ends_in_another_error(outcomes):
    (first, second), _ = outcomes
    assert first[1] == second[1]
    assert [damage for damage, answer in first[1] if not answer.endswith(STEP_1)] == []
    assert len({damage for damage, _ in first[1]}) > 20


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        ("a writer of the second rank finds the disk full", "No space left on device"),
        ("too little is free", "the disk has too little free space"),
    ],
)
def test_what_cannot_be_written_is_a_sentence_and_the_last_checkpoint_is_intact(outcomes, cause, reason):
    (first, second), _ = outcomes
    sentence = first[2][cause]
    assert sentence == second[2][cause]
    assert sentence.startswith(f"--save ROOT/iter_0000003 was not written: {reason} (it needs about ")
    assert "are free); ROOT/iter_0000002 is intact" in sentence and "\n" not in sentence
    assert sentence.endswith("the same command continues from it")  # and no file of it is left
    assert first[2]["there is room again"] == "ROOT/iter_0000003"


def test_a_full_file_system_is_a_sentence_and_nothing_is_left_on_it(outcomes, small_disk):
    if small_disk is None:
        pytest.skip("mounting a small file system is not permitted")
    (first, second), _ = outcomes
    sentence = first[2]["a full file system"]
    assert sentence == second[2]["a full file system"]
    # Which of the two depends on where the writer of a tensor finds no room: in Python's file or in torch's archive.
    reasons = ("No space left on device", "the file system does not take all of it")
    assert any(f"iter_0000003 was not written: {reason} (it needs about" in sentence for reason in reasons)
    assert sentence.endswith("no checkpoint was complete yet; once this is mended, the same command starts again")
    assert list(Path(small_disk).iterdir()) == []


def test_a_saved_checkpoint_is_what_sha256sum_reads_and_has_the_tokenizer(outcomes, tiny_model_dir):
    saved = outcomes[1] / "saved" / "iter_0000003"
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "manifest.sha256"], cwd=saved, check=True)
    assert json.loads((saved / "run_state.json").read_text()) == {"step": 3, "manifest": "manifest.sha256"}
    same = (saved / "tokenizer" / "tokenizer.json").read_bytes() == (tiny_model_dir / "tokenizer.json").read_bytes()
    assert same and "tokenizer/tokenizer.json" in (saved / "manifest.sha256").read_text()
