"""The line of the program that an operation comes from."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import NamedTuple

# Files of the program; other frames of the stack are torch's and Python's.
_PROGRAM = ("/slime_opd/", "/megatron/core/")
_NOT_PROGRAM = ("/slime_opd/rehearsal/",)


class Line(NamedTuple):
    """A line of the program: a path from `slime_opd` or `megatron` on, the function, the line's number."""

    file: str
    function: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number} {self.function}"

    @property
    def name(self) -> str:
        """Without the line number, which every edit changes: `slime_opd/trainer/finite.py non_finite`."""
        return f"{self.file} {self.function}"


# A backward runs in a thread of autograd, whose stack has no line of the program.
AUTOGRAD = Line("autograd", "backward", 0)


@lru_cache(maxsize=4096)
def _relative(path: str) -> str | None:
    if any(part in path for part in _NOT_PROGRAM):
        return None
    for part in _PROGRAM:
        if part in path:
            return Path(path[path.rindex(part) + 1 :]).as_posix()
    return None


def caller() -> Line:
    """The innermost line of the program on this thread's stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = _relative(frame.f_code.co_filename)
        if file is not None:
            return Line(file, frame.f_code.co_qualname, frame.f_lineno)
        frame = frame.f_back
    return AUTOGRAD
