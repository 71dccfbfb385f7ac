"""Megatron-core's options, read from its source: the same fields as its dataclasses have, and every one a flag or a
reason.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
from pathlib import Path

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from slime_opd.config import parse, to_yaml
from slime_opd.config.config import Config
from slime_opd.config.help import help_text
from slime_opd.config.megatron_options import NAMES, layer_pattern, megatron_fields, values_for
from slime_opd.config.megatron_support import MANAGED
from slime_opd.config.options import options_of
from slime_opd.errors import ConfigError

PARTS = {
    "transformer": TransformerConfig,
    "latent_attention": MLATransformerConfig,
    "optimizer": OptimizerConfig,
    "gradients": DistributedDataParallelConfig,
}
OF_MEGATRON = {name: option for name, option in options_of(Config).items() if option.stage == "megatron"}


def unsupported_fields() -> list[str]:
    """Fields with a type that no command line can give."""
    return [f.name for f in megatron_fields().values() if f.declared is None and not f.name.startswith("_")]


def word_for(name: str) -> list[str]:
    """A value that the option takes."""
    option = OF_MEGATRON[name]
    if option.declaration.metavar:
        return ["[0]*2+[1]*3"]
    if option.choices:
        return [option.choices[-1]]
    return {bool: [], int: ["3"], float: ["0.5"], str: ["word"]}[option.kind]


def test_the_source_has_the_fields_of_the_dataclasses():
    for part, dataclass in PARTS.items():
        own = {row.name for row in dataclasses.fields(dataclass)}
        if part == "latent_attention":
            own -= {row.name for row in dataclasses.fields(TransformerConfig)} - {
                "multi_latent_attention",
                "normalization",
            }
        assert {name for name, field in megatron_fields().items() if part in field.parts} == own


def test_every_field_is_a_flag_or_there_is_a_reason():
    options = options_of(Config)
    reasons = {*unsupported_fields(), *MANAGED}
    missing = [n for n in megatron_fields() if n not in options and n not in reasons and not n.startswith("_")]
    assert missing == []
    assert MANAGED.keys() <= megatron_fields().keys() and not MANAGED.keys() & options.keys()


@pytest.mark.parametrize("name", OF_MEGATRON)
def test_every_option_reaches_its_parts_and_only_when_it_is_set(name):
    config = parse([OF_MEGATRON[name].flag, *word_for(name)])
    for part in PARTS:
        values = values_for(config.megatron, part)
        assert set(values) == ({name} if part in megatron_fields()[name].parts else set())
        assert values_for(Config().megatron, part) == {}


@pytest.mark.parametrize("flag", NAMES)
def test_megatron_lms_names_are_fields_here(flag):
    name, word = NAMES[flag]
    assert flag not in {option.flag for option in options_of(Config).values()}
    config = parse([flag, *([] if word else word_for(name))])
    found = getattr(config.megatron, name)
    assert found == {"true": True, "false": False}[word] if word else found is not None


def test_a_switch_is_turned_off_by_no_or_by_false():
    for arguments in (["--no-tp-comm-split-ag"], ["--tp-comm-split-ag", "false"]):
        assert parse(arguments).megatron.tp_comm_split_ag is False


def test_types_are_megatrons():
    config = parse(
        [
            "--moe-layer-freq",
            "[0]*1+[1]*2",
            "--moe-router-load-balancing-type",
            "seq_aux_loss",
            "--moe-aux-loss-coeff",
            "0",
            "0.1",
            "--window-size",
            "4",
            "8",
            "--recompute-modules",
            "core_attn",
            "mlp",
            "--moe-router-topk",
            "1",
            "--qk-clip-alpha",
            "0.25",
        ]
    )
    assert values_for(config.megatron, "transformer") == {
        "moe_layer_freq": [0, 1, 1],
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": [0.0, 0.1],
        "window_size": (4, 8),
        "recompute_modules": ["core_attn", "mlp"],
        "moe_router_topk": 1,
        "qk_clip_alpha": 0.25,
    }


@pytest.mark.parametrize(
    ("text", "pattern"),
    [("4", 4), ("[0,1]", [0, 1]), ("([0]*3+[1]*2)", [0, 0, 0, 1, 1]), (" ([1]+[0]*2)*2 ", [1, 0, 0, 1, 0, 0])],
)
def test_a_pattern_of_layers_is_a_number_or_lists(text, pattern):
    assert layer_pattern(text) == pattern


@pytest.mark.parametrize(
    "text", ["", "x", "[0]*", "[0]**3", "exit()", "[0]*10000000", "1+1", "[0.5]", "__import__('os')"]
)
def test_a_pattern_that_is_neither_is_refused(text):
    with pytest.raises(ValueError, match="expected a whole number or lists of them"):
        layer_pattern(text)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--params-dtype", "bf16"], "--params-dtype is set by this package: use --bf16, --fp16 or --fp32"),
        (["--num-expert", "8"], "--num-expert: unknown flag; did you mean --num-experts?"),
        (["--moe-router-dtype", "fp31"], "expected one of fp32, fp64; did you mean fp32?"),
        (["--no-rope-fusion", "1"], "--no-rope-fusion: found '1', expected no value: it is a switch"),
        (["--no-lr"], "--no-lr: unknown flag"),
        (["--recompute-modules", "mlp", "moon"], "--recompute-modules: found 'moon', expected one of core_attn, mlp"),
        (["--main-params-dtype", "bf16"], "--main-params-dtype: found 'bf16', expected one of fp32, fp16"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, sentence):
    with pytest.raises(ConfigError) as error:
        parse(arguments)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_what_is_set_survives_a_file_and_a_process(tmp_path):
    config = parse(["--overlap-grad-reduce", "--num-experts", "8", "--window-size", "4", "8", "--no-tp-comm-split-ag"])
    assert pickle.loads(pickle.dumps(config)) == config
    text = to_yaml(config)
    assert "tp_comm_split_rs" not in text, "what is not set is not written"
    (tmp_path / "config.yaml").write_text(text)
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config


def test_help_counts_them_and_lists_them_on_request():
    assert f"{len(OF_MEGATRON)} more flags: --help megatron" in help_text(Config)
    lines = [line for line in help_text(Config, ["megatron"]).splitlines() if line.startswith("  --")]
    assert len(lines) >= len(OF_MEGATRON)
    assert any("--moe-router-topk N" in line and "(Megatron: 2)" in line for line in lines)


def test_the_docs_have_the_tables_as_they_are():
    text = (Path(__file__).parents[3] / "docs" / "megatron.md").read_text()
    names, unsayable = (
        text.split(f"## {title}")[1].split("\n## ")[0] for title in ("Megatron-LM's names", "Fields that are no flags")
    )
    said = [f"| `{flag}` | `{field}`{f' = {word}' if word else ''} |" for flag, (field, word) in NAMES.items()]
    assert [line for line in names.splitlines() if line.startswith("| `")] == said
    assert re.findall(r"`(\w+)`", unsayable) == unsupported_fields()
