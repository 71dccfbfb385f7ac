"""Whatever the bytes of a data file are, reading it gives rows, or one DataError of one line."""

import datetime
import decimal
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from byte_tokenizer import byte_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slime_opd.config.stages import DataConfig
from slime_opd.data.columns import Columns
from slime_opd.data.reader import RowReader
from slime_opd.data.source import PromptSource
from slime_opd.errors import DataError

FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def rows_or_one_sentence(path, content: bytes) -> list | str:
    path.write_bytes(content)
    try:
        return list(RowReader(str(path), max_row_bytes=1 << 20))
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return str(error)


@FUZZ
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ""]))
@example(content=b"PAR1PAR1", suffix=".parquet")
@example(content=b"[", suffix=".json")
@example(content=b"[{}", suffix=".json")
@example(content=b"[{},]", suffix=".json")
@example(content=b"[1]", suffix=".json")
@example(content=b'a,b\n"', suffix=".csv")
@example(content=b"\x00", suffix=".csv")
@example(content=b"a\r", suffix=".csv")
def test_any_bytes_give_rows_or_one_sentence(tmp_path, content, suffix):
    rows_or_one_sentence(tmp_path / f"data{suffix}", content)


@FUZZ
@given(
    rows=st.lists(st.one_of(JSON, st.dictionaries(st.sampled_from(["input", "label", "metadata"]), JSON)), max_size=4)
)
@pytest.mark.parametrize("as_array", [False, True], ids=["jsonl", "array"])
@pytest.mark.parametrize("label_user", [None, "--rm-type math"])
@pytest.mark.parametrize("template", [False, True], ids=["text", "template"])
def test_any_json_gives_prompts_or_one_sentence(tmp_path, tokenizer, rows, as_array, label_user, template):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows) if as_array else "\n".join(map(json.dumps, rows)))
    data = DataConfig(prompt_data=str(path), apply_chat_template=template)
    try:
        prompts = PromptSource(data, tokenizer, columns=Columns("input", "label", "metadata", None, label_user))
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert all(prompt.tokens for prompt in prompts.take(len(prompts)))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number that cannot be read"),
        (b'{"a": "\xff"}', "is not UTF-8 text"),
        (b"\xff\xfe{\x00", "is not UTF-8 text"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"null", "is null, expected one object"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"\x1f\x8b\x08\x00", "is compressed (gzip)"),
        (b"\x28\xb5\x2f\xfd\x00", "is compressed (zstd)"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_known_defects_have_their_message(tmp_path, line, sentence, suffix):
    assert sentence in rows_or_one_sentence(tmp_path / f"data{suffix}", line)


TABLES = {
    "text": {"input": ["a", "b"] * 50, "label": ["1", None] * 50},
    "nested": {"input": [[{"role": "user", "content": "x"}]] * 20, "metadata": [{"a": 1, "b": [1.5, None]}] * 20},
    "odd": {
        "input": ["a"] * 3,
        "when": [datetime.datetime(2020, 1, 1)] * 3,
        "much": [decimal.Decimal("1.5")] * 3,
        "raw": [b"\xff\x00"] * 3,
        "for": [datetime.timedelta(1)] * 3,
    },
}


def parquet_bytes(columns, **options) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, **options)
    return sink.getvalue()


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_a_parquet_file_with_changed_bytes_gives_rows_or_one_sentence(tmp_path, data, name, compression):
    content = bytearray(parquet_bytes(TABLES[name], compression=compression))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.none() | st.integers(0, len(content)))
    rows_or_one_sentence(tmp_path / "data.parquet", bytes(content[:end]))


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (decimal.Decimal("1.50"), "1.50"),
        (datetime.datetime(2020, 1, 1), "is a datetime that JSON cannot hold"),
        (b"\xff", "is a bytes that JSON cannot hold"),
        (datetime.timedelta(1), "is a timedelta that JSON cannot hold"),
        (float("nan"), "is nan; expected text or a finite number"),
    ],
)
def test_labels_of_parquets_own_types_are_text_or_one_sentence(tmp_path, tokenizer, label, expected):
    path = tmp_path / "data.parquet"
    path.write_bytes(parquet_bytes({"input": ["a"], "label": [label]}))
    data = DataConfig(prompt_data=str(path), label_key="label")
    try:
        result = PromptSource(data, tokenizer).first.label
    except DataError as error:
        result = str(error)
    assert expected in result


def test_maps_and_large_types_of_parquet_are_read(tmp_path):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    table = pyarrow.table({"m": pyarrow.array([[("a", 1)]], kind), "t": pyarrow.array(["x"], pyarrow.large_string())})
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(table, path)
    [row] = RowReader(str(path))
    assert (row.get("t"), row.get("m")) == ("x", [("a", 1)])


def test_a_time_that_python_cannot_hold_is_one_sentence(tmp_path):
    table = pyarrow.table({"t": pyarrow.array([2**60], pyarrow.timestamp("ms"))})
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match=r"data\.parquet: Parquet that cannot be read"):
        list(RowReader(str(path)))
