"""Reading rows: both layouts, slices, nested keys, and errors that say where."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from slime_opd.data.reader import RowReader
from slime_opd.errors import DataError


def read_rows(spec, **options):
    return list(RowReader(spec, **options))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet}


@pytest.fixture(params=sorted(WRITERS))
def five_rows(request, tmp_path):
    return WRITERS[request.param](tmp_path / f"rows.{request.param}", [{"n": n} for n in range(5)])


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        ("", [0, 1, 2, 3, 4]),
        ("@[1:3]", [1, 2]),
        ("@[:2]", [0, 1]),
        ("@[3:]", [3, 4]),
        ("@[-2:]", [3, 4]),
        ("@[0:99]", [0, 1, 2, 3, 4]),
    ],
)
def test_a_slice_picks_rows_as_python_does_in_either_format(five_rows, suffix, expected):
    assert [row.get("n") for row in read_rows(five_rows + suffix)] == expected


@pytest.mark.parametrize("suffix", ["@[5:]", "@[3:1]"])
def test_a_slice_without_rows_is_an_error(five_rows, suffix):
    with pytest.raises(DataError, match="no rows"):
        read_rows(five_rows + suffix)


@pytest.mark.parametrize("suffix", ["@[1]", "@[a:b]", "@[1:2:3]"])
def test_a_slice_that_cannot_be_read_is_an_error_about_the_slice(five_rows, suffix):
    with pytest.raises(DataError, match="cannot parse the slice"):
        read_rows(five_rows + suffix)


def test_the_format_is_detected_from_the_content(tmp_path):
    assert read_rows(write_parquet(tmp_path / "rows.data", [{"n": 7}]))[0].get("n") == 7


def test_a_parquet_name_without_parquet_inside_is_an_error(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match=r"rows\.parquet.*Git LFS"):
        read_rows(str(path))


def test_a_broken_parquet_file_is_a_data_error(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(DataError, match=r"rows\.parquet: Parquet that cannot be read"):
        read_rows(str(path))


def test_bad_json_names_file_and_line_counting_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n\n{"n": \n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: not valid JSON"):
        read_rows(str(path))


def test_lines_are_still_counted_from_the_top_of_the_file_in_a_slice(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n\n{"n": 2}\n')
    assert read_rows(f"{path}@[1:]")[0].where.endswith("rows.jsonl, line 3")


def test_parquet_rows_are_counted_from_the_top_of_the_file_in_a_slice(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", [{"n": n} for n in range(4)])
    assert [row.where for row in read_rows(f"{path}@[2:]")] == [f"{path}, row 2", f"{path}, row 3"]


def test_a_line_that_is_not_an_object_is_an_error(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"n": 1}\n[{"n": 1}]\n')
    with pytest.raises(DataError, match=r"line 2: is a list, expected one object"):
        read_rows(str(path))


def test_bytes_that_are_not_text_are_a_data_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\xfe\x00junk")
    with pytest.raises(DataError, match=r"line 1: is not UTF-8 text .* expected JSONL, a JSON array, CSV or Parquet"):
        read_rows(str(path))


def test_a_missing_file_and_a_directory_are_data_errors(tmp_path):
    for path, message in ((tmp_path / "absent.jsonl", "cannot read .*No such file"), (tmp_path, "is a directory")):
        with pytest.raises(DataError, match=message):
            read_rows(str(path))


def test_an_empty_file_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        read_rows(str(path))


def test_dots_reach_into_nested_columns_and_a_whole_name_comes_first(tmp_path):
    rows = read_rows(write_jsonl(tmp_path / "rows.jsonl", [{"a": {"b": {"c": 1}}, "x.y": 2, "x": {"y": 3}}]))
    assert rows[0].get("a.b.c") == 1
    assert rows[0].get("x.y") == 2
    assert rows[0].has("a.b") and not rows[0].has("a.b.c.d")


def test_a_missing_key_names_file_row_keys_present_and_the_nearest(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", [{"prompt": "p", "reward_model": {"ground_truth": "1"}}])
    with pytest.raises(DataError) as caught:
        read_rows(path)[0].get("reward_model.ground_thruth")
    assert "rows.parquet, row 0: no key 'reward_model.ground_thruth'" in str(caught.value)
    assert "prompt, reward_model.ground_truth" in str(caught.value)
    assert "did you mean 'reward_model.ground_truth'?" in str(caught.value)
