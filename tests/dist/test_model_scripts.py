"""Every script of scripts/models, read in raw mode, gives Megatron the configuration that bridge mode makes of the family's config."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest
from model_families import family_config
from ranks import run_ranks

pytestmark = pytest.mark.dist

SCRIPTS = sorted((Path(__file__).parents[2] / "scripts" / "models").glob("*.sh"))
# Functions drawn anew for each configuration.
NOT_COMPARED = {"init_method", "output_layer_init_method", "embedding_init_method"}
# What has no effect on a model without a sigmoid router or a loss that balances experts.
WITHOUT_EFFECT = {"moe_aux_loss_coeff", "moe_router_bias_update_rate"}


def _frequencies_of_megatron(width: int, embeddings: dict) -> list[float]:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    rotary = RotaryEmbedding(
        width,
        rotary_percent=embeddings["rotary_percent"],
        rotary_base=embeddings["rotary_base"],
        rope_scaling=True,
        rope_scaling_factor=embeddings["rope_scaling_factor"],
        use_cpu_initialization=True,
    )
    return [round(value, 9) for value in rotary.inv_freq.tolist()]


def _frequencies_of_transformers(config) -> list[float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return [round(value, 9) for value in ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].tolist()]


def differences(rank, world_size, init_method, directory: str):
    """By script: the fields of Megatron's configuration, and of its embeddings, that differ between the two modes."""
    from slime_opd.config import parse
    from slime_opd.config.stages import ParallelConfig
    from slime_opd.model import builder, parallel
    from slime_opd.model.bridge import make_bridge

    parallel.initialize(
        ParallelConfig(), rank=rank, world_size=world_size, init_method=init_method, seed=0, timeout_minutes=5
    )
    found = {}
    for script in SCRIPTS:
        program = f"source '{script}'; printf '%s\\n' \"${{MODEL_ARGS[@]}}\""
        words = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()
        place = f"{directory}/{script.stem}"
        family_config(script.stem, parse(words))[1].save_pretrained(place)
        sides = []
        for more in ([*words, "--megatron-to-hf-mode", "raw"], ["--megatron-to-hf-mode", "bridge"]):
            config = parse([*more, "--hf-checkpoint", place])
            bridge = make_bridge(config)
            values = {
                field.name: getattr(one, field.name)
                for one in [builder.transformer_config(config, bridge)]
                for field in dataclasses.fields(one)
            }
            if values.get("multi_latent_attention"):
                del values["kv_channels"]  # its heads have sizes of their own
            embeddings = {"rotary_percent": 1.0} | builder.embedding_settings(config, bridge)
            compared = ("rotary_base", "rotary_percent", "max_sequence_length", "share_embeddings_and_output_weights")
            values |= {f"embeddings: {name}": embeddings[name] for name in compared}
            if "rope_scaling" in embeddings and embeddings["rope_scaling"]:
                values["rotary frequencies"] = _frequencies_of_megatron(values["kv_channels"], embeddings)
            elif (getattr(bridge.hf_config, "rope_scaling", None) or {}).get("rope_type") == "llama3":
                values["rotary frequencies"] = _frequencies_of_transformers(bridge.hf_config)
            values["post norms"] = builder.post_norms(config, bridge)
            sides.append(values)
        raw, bridged = sides
        found[script.stem] = {
            name: (str(raw.get(name)), str(bridged.get(name)))
            for name in raw.keys() | bridged.keys()
            if name not in NOT_COMPARED and raw.get(name) != bridged.get(name)
        }
    parallel.shut_down()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    (rendezvous := tmp_path_factory.mktemp("rendezvous")).mkdir(exist_ok=True)
    return run_ranks(differences, 1, rendezvous, str(tmp_path_factory.mktemp("configs")))[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_raw_mode_and_bridge_mode_are_one_model(found, script):
    assert {name: values for name, values in found[script.stem].items() if name not in WITHOUT_EFFECT} == {}
