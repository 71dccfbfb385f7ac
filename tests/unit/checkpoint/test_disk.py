"""The sentence for a checkpoint that could not be written."""

from __future__ import annotations

import shutil

import pytest

from slime_opd.checkpoint.disk import check_room, format_bytes, not_written
from slime_opd.errors import CheckpointError


@pytest.mark.parametrize(("count", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (2**40, "1.0 TiB"), (2**60, "1048576.0 TiB")])  # fmt: skip
def test_bytes_are_written_in_the_unit_that_fits(count, text):
    assert format_bytes(count) == text


def test_too_little_room_is_refused_before_anything_is_written_with_what_is_left(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    check_room(tmp_path, "iter_0000013", 1)
    needed = shutil.disk_usage(tmp_path).free + 2**40
    with pytest.raises(CheckpointError) as refusal:
        check_room(tmp_path, "iter_0000013", needed)
    assert str(refusal.value).startswith(
        f"--save {tmp_path}/iter_0000013 was not written: there is no room for it (it needs about "
    )
    assert f"{tmp_path}/iter_0000012 is intact, and once this is mended the same command continues from it" in str(
        refusal.value
    )


def test_before_the_first_checkpoint_and_where_nothing_can_be_known_it_says_so(tmp_path):
    sentence = not_written(tmp_path / "gone", "iter_0000001", 10, "Read-only file system")
    assert sentence == f"--save {tmp_path}/gone/iter_0000001 was not written: Read-only file system (it needs about 10 bytes, an unknown number of bytes are free); no checkpoint was complete yet; once this is mended, the same command starts again"  # fmt: skip
