"""`--check` on data that a run could not use: a sentence that names the file, the line or the flag, exit code 2, and no
traceback.
"""

import json
import shlex
import shutil

import pyarrow
import pyarrow.parquet
import pytest
from conftest import save_tiny_tokenizer

from slime_opd import train
from slime_opd.config import parse
from slime_opd.errors import ConfigError
from slime_opd.preflight.inputs import load_inputs

ROWS = [{"input": f"{number}+1=", "label": str(number + 1)} for number in range(400)]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    root = tmp_path_factory.mktemp("student")
    save_tiny_tokenizer(root)
    (root / "config.json").write_text(json.dumps({"max_position_embeddings": 128, "vocab_size": 64}))
    return root


@pytest.fixture
def write(tmp_path):
    """Writes rows, or text, to a file of the given name; `changes` replaces rows by their index."""

    def write(name="rows.jsonl", rows=ROWS, changes=None):
        path = tmp_path / name
        if isinstance(rows, str):
            path.write_text(rows)
        else:
            changed = [(changes or {}).get(index, row) for index, row in enumerate(rows)]
            path.write_text("".join(json.dumps(row) + "\n" for row in changed))
        return path

    return write


@pytest.fixture
def check(student, capsys):
    """Runs `--check` in this process; returns its exit code, and what it prints as one line of single spaces."""

    def check(path, flags="--rm-type exact_match", response=8, directory=student):
        arguments = (
            f"--hf-checkpoint {directory} --megatron-to-hf-mode bridge --prompt-data {path} --label-key label --num-rollout 2 "
            f"--rollout-batch-size 2 --n-samples-per-prompt 2 --rollout-max-response-len {response} {flags}"
        )
        with pytest.raises(SystemExit) as left:
            train.main(["--check", *shlex.split(arguments)])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return left.value.code, " ".join(printed.out.split())

    return check


def long_prompt(tokens=400):
    return {"input": "1" * tokens, "label": "1"}


def test_what_is_in_the_file_is_printed_in_a_line(write, check):
    path = write(rows=ROWS[:350] + ROWS[:50])
    _, printed = check(path)
    assert f"--prompt-data {path}: 400 prompts, 4 to 6 tokens (median 6), labels in all, 50 duplicates" in printed


CASES = {
    "one long prompt": (
        {"changes": {99: long_prompt()}},
        "1 of 400 prompts are too long, leaving no token for a response in a context of 128; the first is line 100 with 400 tokens: drop them with --too-long-prompts drop, or raise --rollout-max-context-len",
    ),
    "every prompt long": ({"rows": [long_prompt()] * 5}, "5 of 5 prompts are too long"),
    "a prompt that fills the context": ({"changes": {3: long_prompt(128)}}, "1 of 400 prompts are too long"),
    "no label in row 100": (
        {"changes": {99: {"input": "1+1="}}},
        "line 100: no key 'label' (--label-key); present are input",
    ),
    "a null label": (
        {"changes": {99: {"input": "1+1=", "label": None}}},
        "line 100: the label (--label-key label) is null, and --rm-type exact_match compares with it",
    ),
    "an empty label": (
        {"changes": {399: {"input": "1+1=", "label": ""}}},
        "line 400: the label (--label-key label) is empty",
    ),
    "a list as label": (
        {"changes": {99: {"input": "1+1=", "label": ["2"]}}},
        "line 100: the label (--label-key label) is a list, and --rm-type exact_match compares with a single answer",
    ),
    "another key": (
        {"rows": [{"question": "1", "answer": "1", "level": 3}]},
        "line 1: no key 'input' (--input-key); present are question, answer, level",
    ),
    "an empty file": ({"rows": ""}, "rows.jsonl: no rows in the file"),
    "a null prompt": (
        {"changes": {9: {"input": None, "label": "1"}}},
        "line 10: the prompt is null; expected a string or a list of messages (--input-key sets the column)",
    ),
    "a number as prompt": (
        {"changes": {9: {"input": 5, "label": "1"}}},
        "line 10: the prompt is a number; expected a string",
    ),
    "metadata that is no object": (
        {"changes": {300: {**ROWS[0], "metadata": "x"}}},
        "line 301: --metadata-key metadata is a string; expected an object",
    ),
    "an empty prompt": ({"changes": {2: {"input": "", "label": "1"}}}, "line 3: the prompt is empty; remove the row"),
    "broken JSON": ({"rows": '{"input": "1", "label": "1"}\n{"input"\n'}, "line 2: not valid JSON"),
    "half a surrogate pair": (
        {"changes": {5: {"input": "\ud800", "label": "1"}}},
        "line 6: the prompt has the lone surrogate",
    ),
    "messages without a template": (
        {"changes": {0: {"input": [{"role": "user", "content": "1"}], "label": "1"}}},
        "line 1: the prompt is a list of messages; add --apply-chat-template to render it",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_data_is_found_in_any_row_by_check_and_by_a_run_before_ray(write, check, student, name):
    content, sentence = CASES[name]
    path = write(**content)
    code, printed = check(path)
    assert code == 2 and sentence in printed
    with pytest.raises(ConfigError) as caught:
        load_inputs(
            parse(
                shlex.split(
                    f"--hf-checkpoint {student} --prompt-data {path} --label-key label --rm-type exact_match --rollout-max-response-len 8"
                )
            )
        )
    assert sentence in str(caught.value)


def test_long_prompts_are_dropped_and_counted_where_the_flag_says_so(write, check):
    _, printed = check(write(changes={99: long_prompt()}), "--rm-type exact_match --too-long-prompts drop")
    assert "399 prompts, 4 to 6 tokens" in printed
    assert "1 of 400 prompts dropped by --too-long-prompts drop; the first is line 100 with 400 tokens" in printed
    assert "too long" not in printed


def test_a_long_prompt_of_an_evaluation_set_is_found_too(write, check, tmp_path):
    path = write("eval.jsonl", changes={7: long_prompt()})
    code, printed = check(write(), f"--rm-type exact_match --eval-prompt-data held-out {path}")
    assert code == 2 and f"--eval-prompt-data held-out: {path}: 1 of 400 prompts are too long" in printed


@pytest.mark.parametrize(
    ("flags", "response", "sentence"),
    [
        (
            "",
            100000,
            "--rollout-max-response-len: found 100000, expected at most the 128 tokens that prompt and response share",
        ),
        (
            "--rollout-max-context-len 4096",
            8,
            "--rollout-max-context-len: found 4096, expected at most the 128 tokens of",
        ),
        (
            "--rollout-batch-size 1000000000000",
            8,
            "--rollout-batch-size: found 1000000000000, expected at most 100 times the 400",
        ),
        (
            "--use-dynamic-batch-size --max-tokens-per-gpu 4",
            8,
            "--max-tokens-per-gpu: found 4, expected more than the 4 tokens of the shortest prompt",
        ),
    ],
)
def test_impossible_sizes_are_refused(write, check, flags, response, sentence):
    code, printed = check(write(), f"--rm-type exact_match {flags}", response=response)
    assert code == 2 and sentence in printed


def test_epochs_that_make_no_rollout_are_refused(write, student):
    arguments = f"--hf-checkpoint {student} --prompt-data {write(rows=ROWS[:5])} --num-epoch 1 --rollout-batch-size 8"
    with pytest.raises(
        ConfigError, match="--num-epoch 1: the 5 prompts make no whole rollout of --rollout-batch-size 8"
    ):
        load_inputs(parse(shlex.split(arguments)))


def test_responses_that_the_context_cuts_are_noted(write, check):
    _, printed = check(write(changes={0: long_prompt(100)}), response=60)
    assert (
        "the context of 128 leaves fewer than --rollout-max-response-len 60 tokens to 1 prompt (to the longest 28)"
        in printed
    )


def test_json_arrays_csv_and_parquet_are_read(write, check, tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:5]), tmp_path / "rows.parquet")
    files = [
        write("rows.json", json.dumps(ROWS[:5], indent=1)),
        write("rows.csv", "input,label\n" + "".join(f"{row['input']},{row['label']}\n" for row in ROWS[:5])),
        tmp_path / "rows.parquet",
    ]
    for file in files:
        assert "5 prompts, 4 to 4 tokens (median 4), labels in all" in check(file)[1]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "rows.parquet",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a Git LFS pointer, not the data file",
        ),
        ("rows.parquet", "PAR1 and nothing of the kind", "Parquet that cannot be read"),
        ("rows.parquet", "text", "is named .parquet and is not Parquet"),
        ("rows.csv", "input,label\n1\n", "line 2: 1 fields, the header has 2"),
    ],
)
def test_files_of_other_formats_that_are_broken_are_one_sentence(write, check, name, content, sentence):
    code, printed = check(write(name, content))
    assert code == 2 and sentence in printed


def test_a_directory_as_prompt_file_names_the_files_in_it(write, check, tmp_path):
    write()
    code, printed = check(tmp_path)
    assert code == 2
    assert f"--prompt-data: found the directory {tmp_path}, expected a file in it, such as rows.jsonl" in printed


def test_a_row_of_fifty_megabytes_is_refused_before_it_is_tokenised(write, check):
    path = write(rows=json.dumps({"input": "1" * 50_000_000, "label": "1"}))
    code, printed = check(path)
    assert code == 2 and "line 1: the row has more than 16777216 bytes (--max-row-bytes)" in printed
    # The limit is a flag: such a prompt is then too long for this context.
    path = write(rows=json.dumps({"input": "1" * 5000, "label": "1"}))
    assert "(--max-row-bytes)" in check(path, "--rm-type exact_match --max-row-bytes 1000")[1]
    assert "1 of 1 prompts are too long" in check(path)[1]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tokenizer.json", None, "found no tokenizer, expected tokenizer.json and tokenizer_config.json"),
        ("tokenizer.json", "{", "tokenizer.json is not valid JSON"),
        ("tokenizer_config.json", "]", "tokenizer_config.json is not valid JSON"),
    ],
)
def test_a_broken_tokenizer_is_one_sentence_and_says_what_is_not_checked(
    student, write, check, tmp_path, name, content, sentence
):
    broken = tmp_path / "broken"
    shutil.copytree(student, broken)
    (broken / name).unlink() if content is None else (broken / name).write_text(content)
    code, printed = check(write(), directory=broken)
    assert code == 2 and sentence in printed
    assert "data, reward and teacher: they need the tokenizer of --hf-checkpoint" in printed


def test_a_template_that_the_tokenizer_does_not_have_is_one_sentence(write, check):
    code, printed = check(write(), "--rm-type exact_match --apply-chat-template")
    assert code == 2 and "--apply-chat-template: the tokenizer of --hf-checkpoint has no chat template" in printed
    assert "Cannot use chat template functions" not in printed


def test_permuted_ids_of_a_megatron_teacher_are_found(student, write, check, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(student, teacher)
    content = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (teacher / "tokenizer.json").write_text(json.dumps(content))
    code, printed = check(write(), f"--use-opd --opd-type megatron --opd-teacher-load {teacher}")
    assert code == 2 and "2 of 64 ids compared differ: id 12 is 'b' to the teacher and 'a' to the student" in printed
