"""A Ray cluster of one run alone (`--ray-address local`): on loopback, with a token of its own.

Ray reads these settings from the environment when it is imported, so this module imports nothing of it.
"""

from __future__ import annotations

import os
import secrets

# Where Ray waits a minute for a head that may come back, this one is on the same machine and will not.
GCS_TIMEOUT_VARIABLE, GCS_TIMEOUT_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 15


def is_inside_job() -> bool:
    """Whether this process was started by `ray job submit`, where Ray knows its own address."""
    return "RAY_ADDRESS" in os.environ or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def prepare_environment(address: str) -> None:
    """Set the environment for a Ray cluster that this process will start; nothing for one that it joins.

    The token is random, and is in the environment of the run's processes alone: other users can read
    neither it nor, without it, reach the cluster. Whatever the environment held before is for other clusters.
    """
    if address != "local" or is_inside_job():
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    # Named after the systems where it is the default: a local cluster has the loopback address and no other.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault(GCS_TIMEOUT_VARIABLE, str(GCS_TIMEOUT_S))
