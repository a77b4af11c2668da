"""What HTTP answers mean, whoever gives them."""

from __future__ import annotations

import email.utils
import http.client
import re
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import TypeAlias

Headers: TypeAlias = Mapping[str, str] | http.client.HTTPMessage
"""Names in lower case will do."""

PASSING = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
"""Statuses after which the same request may do later."""


def asked_wait(headers: Headers) -> float | None:
    """Seconds that a server tells us to wait: by Retry-After, as a number or a date, or, at the
    Hub, by RateLimit."""
    if found := re.search(r"\br=0\b.*\bt=(\d+)", headers.get("ratelimit", "")):
        return float(found[1])
    text = headers.get("retry-after", "")
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
