"""The process that compares answers for `math.py`: answers each JSON line with "1" or "0", until its input ends.

It imports nothing from this package. An alarm without a handler bounds each comparison: the kernel ends the process.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

from math_verify import parse, verify

_MEMORY_BYTES = 4 * 2**30


def is_equal(label: str, answer: str) -> bool:
    """Whether math-verify considers the answer in the text `answer` equal to `label`."""
    gold = parse(label if "\\boxed" in label or "$" in label else f"\\boxed{{{label}}}", parsing_timeout=None)
    return bool(verify(gold, parse(answer, parsing_timeout=None), timeout_seconds=None))


def main(limit_s: int) -> None:
    """Answer requests, each within `limit_s` seconds."""
    logging.disable(logging.CRITICAL)  # math-verify warns that it has no time limit of its own
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(limit_s)
        equal = is_equal(request["label"], request["answer"])
        signal.alarm(0)
        print(int(equal), file=replies, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
