"""JSON arrays and CSV beside JSONL and Parquet, and the limit on the size of a row."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from slime_opd.data.reader import RowReader
from slime_opd.errors import DataError


def read(path, content: str, **options):
    path.write_text(content, encoding="utf-8")
    return list(RowReader(str(path), **options))


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_of_objects_is_read_like_lines(tmp_path, indent):
    rows = read(tmp_path / "a.json", json.dumps([{"n": 1}, {"n": 2}], indent=indent))
    assert [row.get("n") for row in rows] == [1, 2]


def test_the_rows_of_an_array_know_their_lines_and_are_sliced(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\ufeff[\n {"n": 1},\n\n {"n": 2}, {"n": 3}\n]\n', encoding="utf-8")
    assert [row.where for row in RowReader(str(path))] == [f"{path}, line {n}" for n in (2, 4, 4)]
    assert [row.get("n") for row in RowReader(f"{path}@[1:]")] == [2, 3]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('[{"n": 1}\n{"n": 2}]', "line 2: expected ',' or ']' after an object of the JSON array"),
        ('[{"n": 1},\n', "line 2: not valid JSON"),
        ('[{"n": 1}', "line 1: expected ',' or ']' after an object of the JSON array; is the file complete?"),
        ('[{"n": 1}]\n[{"n": 2}]', "found '[{\"n\": 2}]' after the end of the JSON array"),
        ('[{"n": 1},\n"text"]', "line 2: is a string, expected one object"),
        ("[]", "no rows in the file"),
    ],
)
def test_a_broken_array_names_the_line(tmp_path, content, sentence):
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.json", content)
    assert sentence in str(caught.value)


def test_csv_has_a_header_quoted_line_ends_and_text_values(tmp_path):
    path = tmp_path / "a.csv"
    rows = read(path, 'input,label\n"1 +\n1 =",2\n\n"say ""a, b""",x\n')
    assert [dict(row.columns) for row in rows] == [
        {"input": "1 +\n1 =", "label": "2"},
        {"input": 'say "a, b"', "label": "x"},
    ]
    assert [row.where for row in rows] == [f"{path}, line 2", f"{path}, line 5"]
    assert read(tmp_path / "a.tsv", "input\tlabel\n1,1\t2\n")[0].get("input") == "1,1"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a,b\n1,2\n1\n", "line 3: 1 fields, the header has 2"),
        ("a,b\n1,2,3\n", "line 2: 3 fields, the header has 2"),
        ('a,b\n1,"2\n', "not valid CSV"),
        ("a,b\n", "no rows in the file"),
    ],
)
def test_broken_csv_names_the_line(tmp_path, content, sentence):
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.csv", content)
    assert sentence in str(caught.value)


LONG = "x" * 2000


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", f'{{"n": 1}}\n{{"n": "{LONG}"}}\n', "line 2"),
        ("a.json", f'[{{"n": 1}},\n{{"n": "{LONG}"}}]', "line 2"),
        ("a.csv", f"n\n1\n{LONG}\n", "line 3"),
    ],
)
def test_a_row_above_the_limit_is_refused_with_its_line_and_the_flag(tmp_path, name, content, where):
    with pytest.raises(DataError, match=rf"{where}: .*the row has more than 1000 bytes"):
        read(tmp_path / name, content, max_row_bytes=1000)
    assert len(read(tmp_path / name, content, max_row_bytes=3000)) == 2


def test_a_row_of_parquet_above_the_limit_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": ["1"] * 500 + [LONG] + ["2"] * 500}), path)
    with pytest.raises(DataError, match=r"row 500: the row has more than 1000 bytes \(--max-row-bytes\)"):
        list(RowReader(str(path), max_row_bytes=1000))
    assert len(list(RowReader(str(path), max_row_bytes=3000))) == 1001


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_limit_larger_than_any_file_has_no_effect(tmp_path, name):
    content = {"a.jsonl": '{"n": 1}', "a.json": '[{"n": 1}]', "a.csv": "n\n1"}[name]
    assert len(read(tmp_path / name, content, max_row_bytes=10**30)) == 1


def test_a_line_without_an_end_is_read_up_to_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": "' + "x" * 1_000_000)
    with pytest.raises(DataError, match=r"line 1: the row has more than 1000 bytes"):
        RowReader(str(path), max_row_bytes=1000)


def test_rows_are_read_lazily(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\nbroken\n')
    reader = RowReader(str(path))
    rows = iter(reader)
    assert len(reader) == 3
    assert [next(rows).get("n"), next(rows).get("n")] == [1, 2]
    with pytest.raises(DataError, match="line 3"):
        next(rows)


def test_a_parquet_footer_that_contradicts_its_row_groups_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": list(range(10))}), path)
    content = path.read_bytes()
    # Thrift's zigzag of 10 rows, which the footer has for the file and for its one row group.
    at = content.rindex(b"\x16\x14")
    path.write_bytes(content[:at] + b"\x16\x10" + content[at + 2 :])
    with pytest.raises(DataError, match=r"its footer has \d+ rows, its row groups"):
        list(RowReader(str(path)))
