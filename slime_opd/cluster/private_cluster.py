"""Environment of a Ray cluster for a single run (`--ray-address local`): on loopback, with a random token.

Ray reads these variables when it is imported, so this module does not import it.
"""

from __future__ import annotations

import os
import secrets

# Ray waits a minute for a head node that may restart; this one is on the same machine and does not restart.
GCS_TIMEOUT_VARIABLE, GCS_TIMEOUT_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 15
# Ray starts a worker per core in advance, which no actor of a run uses: each has an environment, so a process, of its
# own.
PRESTART_VARIABLE = "RAY_prestart_worker_first_driver"


def is_inside_job() -> bool:
    """Whether this process was started by `ray job submit`, so that Ray finds its address in the environment."""
    return "RAY_ADDRESS" in os.environ or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def prepare_environment(address: str) -> None:
    """Set the environment of a Ray cluster that this process will start; do nothing for a cluster that it joins.

    The token is random and exists only in the environment of the run's processes, which other users cannot read.
    Without it Ray refuses requests. It replaces tokens of other clusters in the environment.
    """
    if address != "local" or is_inside_job():
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    # "0" makes Ray start a cluster that has only the loopback address, as it does on Windows and macOS.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault(PRESTART_VARIABLE, "0")
    os.environ.setdefault(GCS_TIMEOUT_VARIABLE, str(GCS_TIMEOUT_S))
