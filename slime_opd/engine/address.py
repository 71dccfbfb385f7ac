"""A server's address and the secrets in it, kept apart. Pure."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from slime_opd.config.redact import redact_urls
from slime_opd.errors import ConfigError


@dataclass(frozen=True)
class Address:
    """A server's `base_url` without user info, `headers` that hold the secrets, and `redacted_url` for messages."""

    base_url: str
    redacted_url: str
    headers: dict[str, str] = field(repr=False)

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> Address:
        """Parse a URL. User info in it is sent as basic authentication, `api_key` as a bearer token.

        Raises ConfigError for a URL with user info and a key: a request has one Authorization header.
        """
        # Compressed answers are refused: see body.py.
        headers = {"accept-encoding": "identity"}
        user_info, at, _ = urlsplit(url).netloc.rpartition("@")
        if at and api_key:
            raise ConfigError(
                f"{redact_urls(url)} has a user and password, and an API key is set too: give one of the two"
            )
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        if at:
            user, _, password = user_info.partition(":")
            secret = f"{unquote(user)}:{unquote(password)}".encode()
            headers["authorization"] = f"Basic {base64.b64encode(secret).decode()}"
        return cls(url.replace(f"{user_info}{at}", "", 1) if at else url, redact_urls(url), headers)
