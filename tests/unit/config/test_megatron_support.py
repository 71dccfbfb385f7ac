"""Every field of Megatron-core has one answer, the docs give it, and the checks follow it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from slime_opd.config import parse
from slime_opd.config.check_megatron import notes_of_model_flags
from slime_opd.config.config import Config
from slime_opd.config.help import help_text
from slime_opd.config.megatron_options import is_default, megatron_fields
from slime_opd.config.megatron_support import SUPPORT, Answer
from slime_opd.config.options import options_of
from slime_opd.preflight.rules import problems

OPTIONS = options_of(Config)
DOCS = Path(__file__).parents[3] / "docs" / "megatron.md"
# A value of an option that is not Megatron's default.
OTHER_VALUES = {"bool": {"on": "false", "off": "true"}, "int": "7", "float": "0.7", "str": "word"}


def another_value(name: str) -> str:
    option, default = OPTIONS[name], megatron_fields()[name].default
    if option.declaration.metavar:
        return "[0]*2+[1]*3"
    if option.choices:
        allowed = SUPPORT[name].allowed
        return next(word for word in option.choices if word not in allowed and (allowed or not is_default(name, word)))
    value = OTHER_VALUES[option.kind.__name__]
    return value[default] if isinstance(value, dict) else value


def test_every_field_of_megatron_has_one_answer():
    own = {name for name in megatron_fields() if name in OPTIONS and OPTIONS[name].stage != "megatron"}
    internal = {name for name in megatron_fields() if name.startswith("_")}
    cannot_be_given = {name for name, field in megatron_fields().items() if field.declared is None}
    unanswered = megatron_fields().keys() - SUPPORT.keys() - own - internal - cannot_be_given
    assert unanswered == set(), "classify them in slime_opd/config/megatron_support.py"
    assert SUPPORT.keys() <= megatron_fields().keys() - own, (
        "fields that Megatron no longer has, or that are options of ours"
    )


@pytest.mark.parametrize("name", [name for name, support in SUPPORT.items() if support.is_refused])
def test_what_is_refused_is_refused_by_name_with_the_reason(name):
    flag = OPTIONS[name].flag
    said = [line for line in problems(parse([flag, another_value(name)])) if line.startswith(flag)]
    assert any(SUPPORT[name].reason in line for line in said), said


def default_values() -> dict[str, str]:
    """Megatron's default of each refused option, where it can be given on a command line."""
    defaults = {name: megatron_fields()[name].default for name, support in SUPPORT.items() if support.is_refused}
    arguments = {name: {"on": "true", "off": "false"}.get(default, default) for name, default in defaults.items()}
    return {name: word for name, word in arguments.items() if is_word(name, word)}


def is_word(name: str, word: str) -> bool:
    return word not in ("none", "1024 * 1024") and not SUPPORT[name].refuses_default


@pytest.mark.parametrize(("name", "word"), default_values().items())
def test_megatrons_default_of_what_is_refused_is_accepted(name, word):
    flag = OPTIONS[name].flag
    assert not [line for line in problems(parse([flag, word])) if line.startswith(flag)]


@pytest.mark.parametrize("name", [name for name, support in SUPPORT.items() if support.answer is Answer.ENGINE])
def test_what_needs_transformer_engine_is_refused_without_it(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    flag = OPTIONS[name].flag
    said = [line for line in problems(parse([flag, another_value(name)])) if line.startswith(flag)]
    assert any("needs Transformer Engine" in line and SUPPORT[name].reason in line for line in said), said


ENGINE = "--attention-backend local is chosen"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--fp8-format", "hybrid"], "--fp8 hybrid (--fp8-format) is not supported: rows are packed to any length"),
        (["--disable-tp-comm-overlap-ag"], "--tp-comm-overlap-ag false (--disable-tp-comm-overlap-ag) has no effect here"),
        (["--overlap-param-gather"], "--overlap-param-gather has no effect without --overlap-grad-reduce"),
        (["--bucket-size", "7"], "--bucket-size 7 (--ddp-bucket-size) has no effect without --overlap-grad-reduce"),
        (["--bucket-size", "0", "--overlap-grad-reduce"], "--bucket-size (--ddp-bucket-size): found 0, expected a number above 0"),
        (["--decoupled-min-lr", "1e-7"], "--decoupled-min-lr 1e-07 has no effect without --decoupled-lr"),
        (["--hysteresis", "3"], "--hysteresis 3 needs --fp16"),
        (["--hysteresis", "3", "--fp16", "--loss-scale", "8"], "--hysteresis 3 needs --fp16"),
        (["--sgd-momentum", "0.5"], "--sgd-momentum 0.5 has no effect here: --optimizer has no sgd"),
        (["--recompute-modules", "mlp"], "--recompute-modules mlp has no effect without --recompute-granularity selective"),
        (
            ["--recompute-modules", "layernorm", "--recompute-granularity", "selective", "--attention-backend", "local"],
            f"--recompute-modules layernorm needs Transformer Engine (Megatron recomputes it with its help), and {ENGINE}",
        ),
        (["--distribute-saved-activations"], "--distribute-saved-activations needs --recompute-granularity full"),
        (["--decoder-first-pipeline-num-layers", "2"], "--num-layers-in-first-pipeline-stage 2 (--decoder-first-pipeline-num-layers) needs"),
        (
            shlex.split("--num-layers 4 --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 4"),
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers: found 4 of the model's 4 layers, which leaves 0",
        ),
        (["--deallocate-pipeline-outputs"], "--deallocate-pipeline-outputs needs --pipeline-model-parallel-size 2"),
        (["--moe-aux-loss-coeff", "0", "0.1"], "--moe-aux-loss-coeff 0.0 0.1 is not supported: Megatron scales this loss"),
        (["--moe-router-load-balancing-type", "sinkhorn"], "--moe-router-load-balancing-type sinkhorn is not supported"),
        (["--moe-token-dispatcher-type", "allgather"], "--moe-token-dispatcher-type allgather is not supported"),
        (["--moe-token-dispatcher-type", "flex"], "--moe-token-dispatcher-type flex needs --expert-model-parallel-size 2"),
        (["--moe-token-dispatcher-type", "flex"], "--moe-token-dispatcher-type flex needs the deep_ep package"),
        (["--moe-enable-deepep"], "--moe-enable-deepep has no effect without --moe-token-dispatcher-type flex"),
        (
            shlex.split("--moe-shared-expert-overlap --recompute-granularity selective --recompute-modules shared_experts"),
            "--moe-shared-expert-overlap needs --recompute-modules without shared_experts",
        ),
        (["--fp16", "--initial-loss-scale", "0.5"], "--initial-loss-scale 0.5 is below --min-loss-scale 1"),
        (["--optimizer-cpu-offload"], "--optimizer-cpu-offload needs --use-precision-aware-optimizer"),
        (["--optimizer-cpu-offload", "--fp32"], "--optimizer-cpu-offload needs half precision"),
        (["--num-layers", "2", "--moe-router-dtype", "fp32"], "--moe-router-dtype fp32 has no effect: the model has no experts"),
    ],
)  # fmt: skip
def test_an_option_that_needs_another_is_refused_without_it(arguments, sentence):
    assert any(line.startswith(sentence) for line in problems(parse(arguments))), problems(parse(arguments))


def test_slimes_switches_that_change_nothing_are_accepted():
    arguments = shlex.split(
        "--no-masked-softmax-fusion --moe-grouped-gemm --moe-token-drop-policy probs --moe-aux-loss-coeff 0 "
        "--moe-router-load-balancing-type seq_aux_loss --moe-token-dispatcher-type alltoall --no-rope-fusion "
        "--no-gradient-accumulation-fusion --num-experts 4 --num-layers 2 --cuda-graph-impl none"
    )
    assert not [
        line for line in problems(parse(arguments)) if line.startswith(("--no-", "--moe", "--cuda", "--masked"))
    ]


def test_help_says_what_is_refused():
    lines = {line.split()[0]: line for line in help_text(Config, ["megatron"]).splitlines() if line.startswith("  --")}
    assert "not supported: Transformer Engine's userbuffers" in lines["--tp-comm-overlap"]
    assert "not supported" not in lines["--overlap-grad-reduce"]


def documented() -> list[str]:
    """The rows of the docs' table: answer, fields, reason."""
    groups: dict[tuple[Answer, str], list[str]] = {}
    for name, support in SUPPORT.items():
        groups.setdefault((support.answer, support.reason), []).append(f"`{name}`")
    order = list(Answer)
    rows = sorted(groups.items(), key=lambda row: order.index(row[0][0]))
    return [f"| {answer.value} | {', '.join(names)} | {reason} |" for (answer, reason), names in rows]


def test_the_docs_have_the_answer_of_every_field():
    section = DOCS.read_text().split("## What becomes of each field")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and "`" in line]
    assert lines == documented()


@pytest.fixture
def mixture(tmp_path) -> list[str]:
    """Arguments that take the model from a config.json with 8 experts, 2 of them for each token."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}')
    return ["--hf-checkpoint", str(tmp_path), "--megatron-to-hf-mode", "bridge"]


def test_flags_that_describe_another_model_are_refused_in_bridge_mode(mixture):
    def said(*arguments: str) -> list[str]:
        return [line for line in problems(parse([*mixture, *arguments])) if "takes the model from there" in line]

    assert said("--num-experts", "8", "--moe-router-topk", "2") == []
    (experts,) = said("--num-experts", "4")
    assert experts.startswith("--num-moe-experts: found 4, but ") and "has 8" in experts
    (chosen,) = said("--moe-router-topk", "4")
    assert chosen.startswith("--moe-router-topk: found 4, but ") and "has 2" in chosen


def test_flags_of_the_model_are_not_read_in_bridge_mode_and_a_note_says_so(mixture):
    arguments = ["--moe-router-score-function", "sigmoid", "--moe-router-dtype", "fp32"]
    bridge, raw = parse([*mixture, *arguments]), parse(arguments)
    (note,) = notes_of_model_flags(bridge)
    assert note.endswith("does not read --moe-router-score-function sigmoid") and notes_of_model_flags(raw) == []
