"""Run a server with an API key that other users cannot read: `python -m slime_opd.engine.with_key MODULE ARGUMENTS…`.

Every user of a machine can see the arguments of its processes, and SGLang logs its own. So the key is passed in an
environment variable, which only the same user can read. Inside the process it is removed from the environment and added
to `argv` as a string that prints as ****.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

KEY_VARIABLE = "SLIME_OPD_SERVER_KEY"


class Key(str):
    """A string whose repr hides its value."""

    def __repr__(self) -> str:
        return "'****'"

    def __str__(self) -> str:
        return self  # argparse converts with str(), which would lose the class


def command_with_key(command: Sequence[str]) -> list[str]:
    """The command `python -m MODULE ARGUMENTS…`, changed to take `--api-key` from KEY_VARIABLE."""
    python, dash_m, *rest = command
    return [python, dash_m, "slime_opd.engine.with_key", *rest]


def key_environment(key: str | None) -> dict[str, str]:
    """The environment variables for `command_with_key`; {} without a key."""
    return {} if key is None else {KEY_VARIABLE: key}


def main(module: str, argv: Sequence[str]) -> None:
    """Run `module` as the main module of this process, with the arguments `argv` and the key."""
    sys.argv = [module, *argv, "--api-key", Key(os.environ.pop(KEY_VARIABLE))]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # Through the importable module, not __main__: SGLang pickles its arguments, and so the key's class, for its
    # children.
    from slime_opd.engine import with_key

    with_key.main(sys.argv[1], sys.argv[2:])
