"""The table of families is what is implemented and what is documented."""

from __future__ import annotations

import re
from pathlib import Path

from model_families import FAMILIES

from slime_opd.config.families import SUPPORTED, UNSUPPORTED

DOCUMENT = Path(__file__).parents[3] / "docs" / "models.md"


def test_the_supported_families_are_those_that_the_tests_train():
    from transformers import CONFIG_MAPPING

    from slime_opd.model.families.mimo import MiMoConfig

    types = {name: config.model_type for name in CONFIG_MAPPING for config in [CONFIG_MAPPING[name]]}
    by_class = {CONFIG_MAPPING[name].__name__.removesuffix("Config"): kind for name, kind in types.items()}
    by_class["MiMo"] = MiMoConfig.model_type
    assert {by_class[name] for name, _ in FAMILIES.values()} == set(SUPPORTED)


def test_the_supported_families_have_a_bridge_and_a_row_in_the_documentation():
    from mbridge.core.bridge import _MODEL_REGISTRY

    from slime_opd.model import families

    assert families.make_mbridge and set(SUPPORTED) <= set(_MODEL_REGISTRY)
    rows = set(re.findall(r"`(\w+)ForCausalLM`", DOCUMENT.read_text(encoding="utf-8")))
    assert {kind.replace("_", "") for kind in SUPPORTED} == {row.lower() for row in rows}


def test_every_other_family_of_the_bridge_has_a_reason():
    from mbridge.core.bridge import _MODEL_REGISTRY

    from slime_opd.model import families

    assert families.make_mbridge and set(_MODEL_REGISTRY) <= {*SUPPORTED, *UNSUPPORTED}
    assert not set(SUPPORTED) & set(UNSUPPORTED)
