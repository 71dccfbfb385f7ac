"""Tokenizers: broken directories are one sentence, and a Megatron teacher's ids are compared with the student's."""

import json
import shutil

import pytest
from conftest import TINY_VOCABULARY, save_tiny_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slime_opd.checkpoint import directory
from slime_opd.config import parse
from slime_opd.data.tokenizer import load_tokenizer
from slime_opd.errors import ConfigError, TeacherMismatch
from slime_opd.preflight.findings import Findings
from slime_opd.preflight.tokenizers import (
    inspect_teacher_tokenizer,
    inspect_tokenizer,
)
from slime_opd.teacher.tokenizers import compare_tokenizers


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save(tmp_path_factory.mktemp("student"))


def save(root, vocabulary=TINY_VOCABULARY, eos=1):
    save_tiny_tokenizer(root, vocabulary)
    (root / "config.json").write_text(json.dumps({"vocab_size": 64, "eos_token_id": eos}))
    (root / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return root


def copy(source, target, **changed):
    shutil.copytree(source, target)
    for name, content in changed.items():
        file = target / name.replace("__", ".")
        file.unlink() if content is None else file.write_bytes(content)
    return target


def refusal(path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(path, "--hf-checkpoint")
    message = str(caught.value)
    assert message.startswith("--hf-checkpoint") and "\n" not in message
    return message


def test_a_directory_without_a_tokenizer_says_which_files_are_expected(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "found no tokenizer, expected tokenizer.json and tokenizer_config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"tokenizer__json": b"{"}, "tokenizer.json is not valid JSON"),
        ({"tokenizer__json": b""}, "tokenizer.json is not valid JSON"),
        ({"tokenizer__json": b"[]"}, "tokenizer.json is not a JSON object"),
        ({"tokenizer__json": b"{}"}, "its tokenizer cannot be loaded"),
        ({"tokenizer__json": b"\xff\xfe"}, "tokenizer.json is not valid JSON"),
        ({"tokenizer__json": b"[" * 100_000}, "tokenizer.json is not valid JSON"),
        ({"tokenizer__json": b"version https://git-lfs.github.com/spec/v1\n"}, "tokenizer.json is not valid JSON"),
        ({"tokenizer_config__json": b"nonsense"}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config__json": b'{"tokenizer_class": "NoSuchTokenizer"}'}, "its tokenizer cannot be loaded"),
        ({"tokenizer_config__json": b'{"tokenizer_class": 5}'}, "its tokenizer cannot be loaded"),
        ({"special_tokens_map__json": b"5"}, "special_tokens_map.json is not a JSON object"),
        ({"tokenizer__json": None}, "found no tokenizer"),
    ],
    ids=str,
)
def test_a_broken_file_of_a_tokenizer_is_one_sentence_and_no_warning(
    student, tmp_path, changed, sentence, capfd, recwarn
):
    path = copy(student, tmp_path / "broken", **changed)
    assert sentence in refusal(path)
    assert capfd.readouterr() == ("", "")
    assert list(recwarn) == []


def test_code_of_a_model_directory_is_not_run_and_no_prompt_appears(student, tmp_path):
    config = json.loads((student / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    path = copy(student, tmp_path / "evil", tokenizer_config__json=json.dumps(config).encode())
    (path / "evil.py").write_text("raise SystemExit(9)")
    assert "its tokenizer cannot be loaded" in refusal(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_tokenizer_with_changed_bytes_loads_or_is_one_sentence(student, tmp_path, name, data):
    path = tmp_path / "fuzzed"
    shutil.rmtree(path, ignore_errors=True)
    copy(student, path)
    content = bytearray((path / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (path / name).write_bytes(content[: data.draw(st.none() | st.integers(0, len(content)))])
    loads_or_is_refused(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(["model", "added_tokens", "pre_tokenizer", "decoder", "version", "normalizer"]), value=JSON)
@example(key="model", value={"type": "WordLevel", "vocab": {}, "unk_token": "x"})
@example(key="added_tokens", value=[{"id": -1}])
def test_a_tokenizer_with_a_changed_part_loads_or_is_one_sentence(student, tmp_path, key, value):
    path = tmp_path / "fuzzed"
    shutil.rmtree(path, ignore_errors=True)
    copy(student, path)
    content = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps({**content, key: value}))
    loads_or_is_refused(path)


def loads_or_is_refused(path):
    try:
        load_tokenizer(path, "--hf-checkpoint")
    except ConfigError as error:
        assert "\n" not in str(error)


# --- teacher and student


def teacher_findings(student, teacher) -> Findings:
    found = Findings()
    config = parse(
        ["--hf-checkpoint", str(student), "--use-opd", "--opd-type", "megatron", "--opd-teacher-load", str(teacher)]
    )
    inspect_teacher_tokenizer(config, inspect_tokenizer(config, found), found)
    return found


def test_equal_tokenizers_are_reported_as_equal(student, tmp_path):
    found = teacher_findings(student, save(tmp_path))
    assert found.problems == []
    assert found.ok == [
        f"--opd-teacher-load {tmp_path}: all 64 ids that its tokenizer shares with the student's are the same tokens; both end at 1"
    ]


def test_permuted_ids_of_a_megatron_teacher_are_found_with_the_first_that_differs(student, tmp_path):
    permuted = list(TINY_VOCABULARY)
    permuted[12], permuted[13] = permuted[13], permuted[12]
    [problem] = teacher_findings(student, save(tmp_path, tuple(permuted))).problems
    assert f"the teacher's tokenizer ({tmp_path}) is not the student's: 2 of 64 ids compared differ" in problem
    assert "id 12 is 'b' to the teacher and 'a' to the student" in problem


def test_ids_that_one_of_them_has_alone_are_counted_and_no_problem(student, tmp_path):
    found = teacher_findings(student, save(tmp_path, TINY_VOCABULARY[:60]))
    assert found.problems == []
    assert "all 60 ids" in found.ok[0] and "(4 only the student's, from 60)" in found.ok[0]


def test_tokens_that_are_written_differently_and_mean_the_same_text_are_equal():
    class Written:
        def __init__(self, names):
            self.names = names

        def get_vocab(self):
            return {name: index for index, name in enumerate(self.names)}

        def batch_decode(self, rows):
            return [self.names[row[0]].replace("▁", " ").replace("Ġ", " ") for row in rows]

    assert compare_tokenizers(Written(["▁the", "a"]), Written(["Ġthe", "a"]), "T").startswith("all 2 ids")
    with pytest.raises(TeacherMismatch, match="id 0 is ' an' to the teacher and ' the' to the student"):
        compare_tokenizers(Written(["▁the", "a"]), Written(["Ġan", "a"]), "T")


def test_a_teacher_that_ends_elsewhere_is_a_problem(student, tmp_path):
    root = save(tmp_path, eos=5)
    config = json.loads((root / "tokenizer_config.json").read_text())
    (root / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "3"}))
    (root / "special_tokens_map.json").write_text('{"eos_token": "3"}')
    [problem] = teacher_findings(student, root).problems
    assert "the teacher ends at [5], the student at [1]: the student would learn not to end" in problem


def test_a_checkpoint_without_a_tokenizer_is_not_checked_and_says_why(student, tmp_path):
    step = tmp_path / "iter_0000001"
    step.mkdir()
    (step / ".metadata").write_bytes(b"")
    (tmp_path / directory.TRACKER).write_text("1")
    found = teacher_findings(student, tmp_path)
    assert found.problems == []
    assert found.unchecked == [
        f"--opd-teacher-load {tmp_path}: its tokenizer, for there is none beside the checkpoint (tools/convert_hf_to_torch_dist.py keeps it)"
    ]


def test_a_tokenizer_that_was_kept_beside_a_checkpoint_is_compared(student, tmp_path, monkeypatch):
    step = tmp_path / "iter_0000001"
    (step / "kept").mkdir(parents=True)
    (step / ".metadata").write_bytes(b"")
    (tmp_path / directory.TRACKER).write_text("1")
    save_tiny_tokenizer(step / "kept", (*TINY_VOCABULARY[1:], "<pad>"))
    monkeypatch.setattr(directory, "tokenizer_dir", lambda location: location.directory / "kept", raising=False)
    [problem] = teacher_findings(student, tmp_path).problems
    assert "64 of 64 ids compared differ: id 0 is" in problem


def test_a_broken_tokenizer_of_the_teacher_names_its_flag(student, tmp_path):
    root = save(tmp_path)
    (root / "tokenizer.json").write_text("{")
    [problem] = teacher_findings(student, root).problems
    assert problem.startswith("--opd-teacher-load") and "tokenizer.json is not valid JSON" in problem
