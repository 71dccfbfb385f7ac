"""Devices are reserved where there are enough."""

from __future__ import annotations

import pytest

from slime_opd.cluster import session
from slime_opd.config import parse
from slime_opd.errors import ConfigError


def test_a_cluster_of_cpus_is_not_filled_with_more_processes_than_it_can_run(monkeypatch):
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(ConfigError, match=r"64 training processes and 1 of engines .* too many for 2 CPU cores"):
        session.reserve(parse(["--actor-num-gpus-per-node", "64"]))
    assert len(session.reserve(parse(["--actor-num-gpus-per-node", "2"])).trainers) == 2
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 64.0})
    assert len(session.reserve(parse(["--actor-num-gpus-per-node", "64"])).trainers) == 64
