"""Whatever is in the files of a model, `--check` ends with its closing line: never a traceback, never ready with
damaged weights.
"""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from slime_opd.preflight.check import INSPECTIONS, check

FILES = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")
# Values of every type of JSON, and sizes that are none.
VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, 0, -1, 1, 2, 10**8, 10**12, 10**400, 1.5, float("nan"), float("inf"), "", "x", "64"]
    ),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(
        st.sampled_from(["rope_type", "factor", "type", "x"]), st.integers() | st.text(max_size=3), max_size=2
    ),
)


@pytest.fixture(scope="module")
def model(tiny_model_dir, tmp_path_factory):
    """A directory with a copy of the tiny model, and an index of its one file."""
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(tiny_model_dir, root / "model")
    with safe_open(tiny_model_dir / "model.safetensors", framework="pt") as weights:
        weight_map = dict.fromkeys(weights.keys(), "model.safetensors")
    (root / "model/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root


# The tokenizer, and what needs it, have tests of their own.
WITHOUT_TOKENIZER = tuple(one for one in INSPECTIONS if one.name != "data and teacher")


def checked(directory, capsys, mode="bridge"):
    """The problems that are found, but that of --prompt-data: there is none."""
    flags = "--num-rollout 1 --rollout-batch-size 2 --rollout-max-response-len 8 --use-opd --opd-type megatron --prompt-data x"
    models = ["--hf-checkpoint", str(directory), "--opd-teacher-load", str(directory), "--megatron-to-hf-mode", mode]
    code = check([*flags.split(), *models], WITHOUT_TOKENIZER)
    lines = capsys.readouterr().out.splitlines()
    problems = [line for line in lines if line.startswith("problem ")]
    assert (code, lines[-1].partition(",")[0]) == (2, f"{len(problems)} problem" + "s" * (len(problems) > 1))
    assert not any("internal error" in line for line in lines), lines
    return [line for line in problems if "--prompt-data" not in line]


def opens(file) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except SafetensorError:
        return False


FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_the_model_itself_has_no_problem(model, capsys):
    assert checked(model / "model", capsys) == []


@FUZZ
@given(data=st.data())
def test_any_bytes_in_any_file_are_ready_or_sentences(model, tmp_path, capsys, data):
    name = data.draw(st.sampled_from(FILES))
    whole = (model / "model" / name).read_bytes()
    content = bytearray(whole)
    # Weights differ in nothing that a header shows: their bytes are the checksums' business.
    end = len(content) if name != "model.safetensors" else 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(0, 5))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(content)))
    mutated = bytes(content[:cut])
    directory = tmp_path / "model"
    shutil.copytree(model / "model", directory, dirs_exist_ok=True)
    (directory / name).write_bytes(mutated)
    problems = checked(directory, capsys)
    if name == "model.safetensors" and (len(mutated) < len(whole) or not opens(directory / name)):
        assert problems


@FUZZ
@given(data=st.data())
def test_any_value_of_any_key_of_the_config_is_ready_or_sentences(model, tmp_path, capsys, data):
    directory = tmp_path / "model"
    shutil.copytree(model / "model", directory, dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text())
    keys = st.sampled_from(
        [*config, "text_config", "rope_parameters", "quantization_config", "num_experts", "mlp_only_layers"]
    )
    for _ in range(data.draw(st.integers(1, 3))):
        config[data.draw(keys)] = data.draw(VALUES)
    config["model_type"] = data.draw(
        st.sampled_from([config["model_type"], "llama", "qwen3_moe", "mixtral", "deepseek_v3", "glm4"])
    )
    (directory / "config.json").write_text(json.dumps(config))
    checked(directory, capsys)


@FUZZ
@given(
    weight_map=st.dictionaries(
        st.text(max_size=5), VALUES | st.text(max_size=5) | st.just("model.safetensors"), max_size=3
    )
    | VALUES
)
def test_any_index_is_ready_or_sentences(model, tmp_path, capsys, weight_map):
    directory = tmp_path / "model"
    shutil.copytree(model / "model", directory, dirs_exist_ok=True)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert checked(directory, capsys)
