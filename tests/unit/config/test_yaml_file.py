import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slime_opd.config import Config, parse, to_yaml
from slime_opd.config.options import Option, options_of
from slime_opd.config.parser import build
from slime_opd.errors import ConfigError

PRINTABLE = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]))


def values_of(option: Option) -> st.SearchStrategy:
    one = {
        int: st.integers(-(10**12), 10**12),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: st.sampled_from(option.choices) if option.choices else PRINTABLE,
    }[option.kind]
    if option.many:
        return st.lists(one, max_size=3).map(tuple)
    return st.none() | one if option.optional else one


CONFIGS = st.builds(
    build,
    st.fixed_dictionaries({}, optional={name: values_of(option) for name, option in options_of(Config).items()}),
    st.dictionaries(st.from_regex(r"[a-z]+(-[a-z]+)*", fullmatch=True), st.lists(PRINTABLE, max_size=2).map(tuple)),
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.yaml"


def read(file, text: str, *argv: str) -> Config:
    file.write_text(text, encoding="utf-8")
    return parse(["--config", str(file), *argv])


def problems_of(file, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(file, text)
    return str(caught.value).splitlines()


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=CONFIGS)
@example(config=build({}, {"a": ("\x85",)}))  # a line break to YAML, unless it is escaped
def test_a_written_config_is_read_back_equal(file, config):
    # `server-concurrency` is an option of ours, not of the engines.
    config.sglang.pop("server-concurrency", None)
    assert read(file, to_yaml(config)) == config


def test_keys_have_dashes_or_underscores_and_values_their_types(file):
    config = read(
        file, "use-opd: true\nopd_type: sglang\nlr: 1e-6\nrollout-stop-token-ids: [1, 2]\nrollout-stop: end\n"
    )
    assert (config.opd.use_opd, config.opd.opd_type, config.optimizer.lr) == (True, "sglang", 1e-6)
    assert (config.rollout.rollout_stop_token_ids, config.rollout.rollout_stop) == ((1, 2), ("end",))


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(file):
    config = read(file, "lr: 1\nseed: 5\nuse-opd: true\n", "--lr", "2", "--use-opd=false")
    assert (config.optimizer.lr, config.training.seed, config.opd.use_opd) == (2.0, 5, False)


def test_engine_options_become_strings(file):
    config = read(file, "sglang_cuda_graph_bs: [1, 2]\nsglang-enable-x: true\nsglang-y: false\nsglang-z: 0.5\n")
    assert config.sglang == {"cuda-graph-bs": ("1", "2"), "enable-x": (), "z": ("0.5",)}


def test_problems_name_file_and_line_and_come_together(file):
    text = "# a comment\nlr: fast\nuse_odp: true\nuse-opd: 1\nseed: true\nlabel-key: [a]\nnum-rollout: null\nhf-checkpoint: {a: 1}\nopd-type: x\nlr: 1\n"
    assert problems_of(file, text) == [
        f"{file}:2: lr: found 'fast', expected a number",
        f"{file}:3: unknown option 'use_odp'; did you mean use_opd?",
        f"{file}:4: use-opd: found 1, expected true or false",
        f"{file}:5: seed: found true, expected a whole number",
        f"{file}:6: label-key: found ['a'], expected text",
        f"{file}:8: hf-checkpoint: found {{'a': 1}}, expected text",
        f"{file}:9: opd-type: found 'x', expected one of sglang, megatron",
        f"{file}:10: 'lr' is also on line 2, expected it once",
    ]


def test_null_is_refused_where_an_option_cannot_be_unset(file):
    assert problems_of(file, "lr: null\n") == [f"{file}:1: lr: found null, expected a number"]


@pytest.mark.parametrize(("text", "found"), [("- a\n", "sequence"), ("word\n", "scalar")])
def test_a_file_that_is_no_mapping_is_refused(file, text, found):
    assert problems_of(file, text) == [
        f"--config {file}: found a {found}, expected a mapping of option names to values"
    ]


def test_a_file_that_is_not_yaml_or_not_there_is_one_sentence(file, tmp_path):
    (problem,) = problems_of(file, "a: [1\nb: 2\n")
    assert problem == f"{file}:2: not YAML: expected ',' or ']', but got ':'"
    with pytest.raises(ConfigError, match=r"--config .*missing.yaml: cannot be read: No such file"):
        parse(["--config", str(tmp_path / "missing.yaml")])


@pytest.mark.parametrize("argv", [["--config"], ["--config", "a", "b"], ["--config", "a", "--config", "b"]])
def test_config_takes_one_file(argv):
    with pytest.raises(ConfigError, match="expected one YAML file"):
        parse(argv)


def test_an_empty_file_says_nothing(file):
    assert read(file, "# nothing\n") == Config()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lr: 1e-6\n\tsave: x\n", ":2: found a tab, expected spaces: YAML takes no tabs before a key or a value"),
        ("lr: .nan\n", ":1: lr: found nan, expected a finite number"),
        (f"seed: {10**30}\n", f":1: seed: found {10**30}, expected a whole number of at most 64 bits"),
        ("save: 2021-99-99\n", ": not YAML that can be read: month must be in 1..12"),
    ],
)
def test_what_yaml_says_of_a_file_is_put_in_a_sentence(file, text, sentence):
    (problem,) = problems_of(file, text)
    assert problem.endswith(f"{file}{sentence}")
