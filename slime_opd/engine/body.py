"""An answer's body: read up to a limit, and parsed as JSON.

A server that is wrong, or is not the server one meant, must cost one failed request: not the
client's memory, and not an exception that nobody expects.
"""

from __future__ import annotations

import json
from typing import Any

import httpx

from slime_opd.errors import EngineError

# Of any answer: room for an error page, a server's description or a short response with its text.
_LEAST_LIMIT = 4 << 20
# A row `[-2.8580782413482666, 151935, null], ` has 38 bytes.
_BYTES_PER_ROW = 128


def body_limit(num_rows: int) -> int:
    """Bytes that an answer with `num_rows` log-prob rows may have: more than three times what SGLang sends."""
    return _LEAST_LIMIT + _BYTES_PER_ROW * num_rows


async def read_body(response: httpx.Response, limit: int) -> bytes:
    """The body of a response that was opened as a stream. Raises EngineError where it is compressed or has more than `limit` bytes."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        # A kilobyte can decompress to a megabyte, and twice compressed to a gigabyte.
        raise EngineError(
            f"the answer is compressed (content-encoding {encoding[:40]!r}) although the request accepts none: turn compression off in the proxy before the server"
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
        raise EngineError(f"the answer has more than {limit:,} bytes, several times what was asked for: not read")
    return b"".join(chunks)


def parse_json(body: bytes) -> Any:
    """The JSON value of a body. Raises EngineError where it is none; numbers are checked where they are used."""
    try:
        return json.loads(body.decode("utf-8"))
    except ValueError:
        raise EngineError(f"the answer is not JSON: {excerpt(body)!r}") from None
    except RecursionError:
        raise EngineError(f"the answer is nested too deeply to be read: {excerpt(body)!r}") from None


def excerpt(body: bytes, length: int = 200) -> str:
    """The beginning of a body, for messages."""
    return body[:length].decode("utf-8", errors="replace")
