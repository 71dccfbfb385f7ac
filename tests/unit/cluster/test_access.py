"""Where the servers of a run listen, and what a private Ray cluster asks of those who come."""

from __future__ import annotations

import os
import pickle

import pytest

from slime_opd.cluster import private_cluster
from slime_opd.cluster.access import access_for


def test_on_one_node_servers_listen_on_loopback_without_a_key():
    access = access_for(["a", "a"])
    assert (access.host("10.0.0.1"), access.key) == ("127.0.0.1", None)


def test_across_nodes_servers_listen_on_their_nodes_address_with_a_random_key():
    access = access_for(["a", "b", "a"])
    assert (access.host("10.0.0.1"), access.host("10.0.0.2")) == ("10.0.0.1", "10.0.0.2")
    assert len(access.key) >= 32 and access.key != access_for(["a", "b"]).key
    assert access.key not in repr(access)
    assert pickle.loads(pickle.dumps(access)) == access  # it travels to the actors


@pytest.fixture
def outside_of_jobs(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    for name in list(os.environ):
        if name.startswith("RAY_"):
            monkeypatch.delenv(name)
    # Restored after the test, whatever it sets.
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", private_cluster.PRESTART_VARIABLE)
    for name in names:
        monkeypatch.setenv(name, "before")
    monkeypatch.setenv(private_cluster.GCS_TIMEOUT_VARIABLE, "7")
    monkeypatch.delenv(private_cluster.PRESTART_VARIABLE)
    return monkeypatch


def test_a_private_cluster_has_a_random_token_and_listens_on_loopback(outside_of_jobs):
    tokens = set()
    for _ in range(2):
        private_cluster.prepare_environment("local")
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
        assert os.environ[private_cluster.PRESTART_VARIABLE] == "0"
        tokens.add(os.environ["RAY_AUTH_TOKEN"])
    assert len(tokens) == 2 and all(len(token) == 64 for token in tokens)
    assert os.environ[private_cluster.GCS_TIMEOUT_VARIABLE] == "7"  # the user's own


@pytest.mark.parametrize(("address", "job"), [("auto", False), ("10.0.0.1:6379", False), ("local", True)])
def test_a_cluster_that_is_joined_keeps_its_own_settings(address, job, outside_of_jobs):
    if job:
        outside_of_jobs.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    private_cluster.prepare_environment(address)
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]) == ("before", "before")
