"""Free space for a checkpoint, and the error message for one that could not be written."""

from __future__ import annotations

import shutil

import pytest

from slime_opd.checkpoint.disk import check_free_space, format_bytes, not_written
from slime_opd.errors import CheckpointError


@pytest.mark.parametrize(("count", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (2**40, "1.0 TiB"), (2**60, "1048576.0 TiB")])  # fmt: skip
def test_bytes_are_formatted_in_the_largest_fitting_unit(count, text):
    assert format_bytes(count) == text


def test_too_little_free_space_is_refused_and_the_message_names_the_intact_checkpoint(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    check_free_space(tmp_path, "iter_0000013", 1)
    needed = shutil.disk_usage(tmp_path).free + 2**40
    with pytest.raises(CheckpointError) as refusal:
        check_free_space(tmp_path, "iter_0000013", needed)
    assert str(refusal.value).startswith(
        f"--save {tmp_path}/iter_0000013 was not written: the disk has too little free space (it needs about "
    )
    assert f"{tmp_path}/iter_0000012 is intact, and once this is mended the same command continues from it" in str(
        refusal.value
    )


def test_the_message_before_the_first_checkpoint_and_with_unknown_free_space(tmp_path):
    sentence = not_written(tmp_path / "gone", "iter_0000001", 10, "Read-only file system")
    assert sentence == f"--save {tmp_path}/gone/iter_0000001 was not written: Read-only file system (it needs about 10 bytes, an unknown number of bytes are free); no checkpoint was complete yet; once this is mended, the same command starts again"  # fmt: skip
