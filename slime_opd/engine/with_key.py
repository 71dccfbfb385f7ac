"""Runs a server with an API key that no one else can read: `python -m slime_opd.engine.with_key MODULE ARGUMENTS…`.

Arguments of a process are visible to every user of its machine, and SGLang writes its own into its log. So the
key comes in an environment variable, which only the same user can read, is taken out of it, and is added to the
arguments inside the process, as a string that prints as ****.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

KEY_VARIABLE = "SLIME_OPD_SERVER_KEY"


class Key(str):
    """A string that shows its value only to who compares or sends it."""

    def __repr__(self) -> str:
        return "'****'"

    def __str__(self) -> str:
        return self  # argparse converts with str(), which would lose the class


def command_with_key(command: Sequence[str]) -> list[str]:
    """`python -m MODULE ARGUMENTS…` as a command that takes `--api-key` from KEY_VARIABLE."""
    python, dash_m, *rest = command
    return [python, dash_m, "slime_opd.engine.with_key", *rest]


def key_environment(key: str | None) -> dict[str, str]:
    """The environment variables that such a command needs; none without a key."""
    return {} if key is None else {KEY_VARIABLE: key}


def main(module: str, arguments: Sequence[str]) -> None:
    """Run `module` as the main module of this process."""
    sys.argv = [module, *arguments, "--api-key", Key(os.environ.pop(KEY_VARIABLE))]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # As an importable module: SGLang sends its arguments, and so the class of the key, to the processes it spawns.
    from slime_opd.engine import with_key

    with_key.main(sys.argv[1], sys.argv[2:])
