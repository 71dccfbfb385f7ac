"""The body of an answer: read up to a size limit, and parsed as JSON.

An answer from a broken or wrong server raises EngineError; it does not fill the client's memory.
"""

from __future__ import annotations

import json
from typing import Any

import httpx

from slime_opd.errors import EngineError

# Enough for an error page, a server's description or a short response with its text.
_MIN_LIMIT = 4 << 20
# A row `[-2.8580782413482666, 151935, null], ` has 38 bytes.
_BYTES_PER_ROW = 128


def body_limit(num_rows: int) -> int:
    """Largest accepted size, in bytes, of an answer with `num_rows` log-prob rows: three times that of SGLang's."""
    return _MIN_LIMIT + _BYTES_PER_ROW * num_rows


async def read_body(response: httpx.Response, limit: int) -> bytes:
    """The body of a streamed response. Raises EngineError if it is compressed or has more than `limit` bytes."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        # A kilobyte can decompress to a megabyte, and twice compressed to a gigabyte.
        raise EngineError(
            f"the answer is compressed (content-encoding {encoding[:40]!r}) although the request accepts no "
            "compression: turn it off in the proxy in front of the server"
        )
    declared = response.headers.get("content-length", "")
    size, chunks = int(declared) if declared.isascii() and declared.isdigit() and len(declared) < 19 else 0, []
    if size <= limit:
        size = 0
        async for chunk in response.aiter_bytes():
            chunks.append(chunk)
            size += len(chunk)
            if size > limit:
                break
    if size > limit:
        raise EngineError(f"the answer has more than {limit:,} bytes, several times what was requested: not read")
    return b"".join(chunks)


def parse_json(body: bytes) -> Any:
    """The JSON value of a body. Raises EngineError if it is not JSON; numbers are checked by their users."""
    try:
        return json.loads(body.decode("utf-8"))
    except ValueError:
        raise EngineError(f"the answer is not JSON: {excerpt(body)!r}") from None
    except RecursionError:
        raise EngineError(f"the answer is nested too deeply to be read: {excerpt(body)!r}") from None


def excerpt(body: bytes, length: int = 200) -> str:
    """The beginning of a body, for messages."""
    return body[:length].decode("utf-8", errors="replace")
