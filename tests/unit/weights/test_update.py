"""Weights sent to scripted engines, and the check that they serve them."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from scripted_engine import FusedModel, ScriptedEngine, weights

from slime_opd.config import stages
from slime_opd.config.config import Config
from slime_opd.errors import WeightSyncError
from slime_opd.weights.tensor import TensorTransport
from slime_opd.weights.update import WeightSender


def config(tmp_path, transport: str, engines: int = 1) -> Config:
    (tmp_path / "model").mkdir()
    return Config(
        cluster=stages.ClusterConfig(rollout_num_gpus=engines),
        model=stages.ModelConfig(hf_checkpoint=str(tmp_path / "model")),
        # A bucket for each tensor.
        weights=stages.WeightsConfig(
            update_weight_transport=transport,
            update_weight_buffer_size=1,
            update_weight_disk_dir=str(tmp_path / "disk"),
        ),
    )


def send(options: Config, engines: list[ScriptedEngine], start: float = 0.0, *, check: bool = True) -> None:
    with closing(WeightSender(options, 0, [engine.url for engine in engines])) as sender:
        sender.send(lambda: iter(weights(start).items()), 7, check=check)


def serves(engine: ScriptedEngine, expected: dict[str, torch.Tensor]) -> bool:
    qk = torch.cat([expected["q"], expected["k"]])
    return all(model.qk.equal(qk) and model.norm.equal(expected["norm"]) for model in engine.models)


@pytest.mark.parametrize("transport", ["tensor", "disk"])
def test_engines_serve_the_sent_weights_and_pass_the_check(transport, tmp_path):
    with ScriptedEngine() as first, ScriptedEngine() as second:
        send(config(tmp_path, transport, engines=2), [first, second])
        for engine in (first, second):
            assert serves(engine, weights()) and engine.version == "7"
            # Once for the whole update, however many buckets it has.
            assert engine.paths.count("/get_weights_by_name") == 1


def test_without_the_check_weights_are_sent_once(tmp_path):
    with ScriptedEngine() as engine:
        send(config(tmp_path, "tensor"), [engine], check=False)
        assert serves(engine, weights())
        assert engine.paths == [*["/update_weights_from_tensor"] * 3, "/flush_cache", "/update_weight_version"]


def test_an_engine_that_answers_before_it_has_copied_still_gets_every_bucket(tmp_path):
    with ScriptedEngine(reads_late=True) as engine:
        send(config(tmp_path, "tensor"), [engine])
        assert serves(engine, weights())


class Forgetful(FusedModel):
    """Loses a part of the loaded weights, each time another one, and reports success."""

    def load_weights(self, named_tensors) -> None:
        super().load_weights(named_tensors)
        self.norm[0] += torch.rand(())


def test_an_engine_that_serves_other_weights_fails_the_check_by_name(tmp_path):
    options = config(tmp_path, "tensor", engines=2)
    with ScriptedEngine() as good, ScriptedEngine([Forgetful()]) as bad:
        with pytest.raises(
            WeightSyncError, match=f"{bad.url} does not serve .*: 1 parameters changed when .* sent again, first norm$"
        ):
            send(options, [good, bad])
        assert serves(good, weights())


def test_a_transport_that_is_wrong_in_the_same_way_each_time_fails_the_check(tmp_path, monkeypatch):
    original = TensorTransport.send
    monkeypatch.setattr(
        TensorTransport,
        "send",
        lambda self, bucket: original(self, [(n, t.flip(0)) for n, t in bucket]) if bucket[0][0] != "q" else None,
    )
    with (
        ScriptedEngine() as engine,
        pytest.raises(
            WeightSyncError,
            match="2 weights arrived with other values, first k, norm; 1 weights did not arrive, first q",
        ),
    ):
        send(config(tmp_path, "tensor"), [engine])
