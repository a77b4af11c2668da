"""What failures of requests to the Hub mean, for reading and for writing alike."""

from __future__ import annotations

import http.client
import re
from json import JSONDecodeError
from urllib.parse import urlsplit

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from ..errors import one_line
from .http_answers import PASSING, asked_wait
from .remote import TryAgainError

HTTP_ERROR = HfHubHTTPError.__mro__[1]
"""HTTPError of httpx or httpx2, whichever the library stands on."""

TRANSPORT_ERRORS: tuple[type[Exception], ...] = (
    *(HTTP_ERROR, OSError),
    *(http.client.HTTPException, JSONDecodeError),
)
"""All that requests raise; the library's own errors are among them. What is not JSON comes from
somebody between, such as a network that wants a login."""

LOG_IN = "set HF_TOKEN or run hf auth login"


def wrong_setting() -> str | None:
    """What no request can be made with; None if there is nothing. The library, or what it stands
    on, would say so of each request, in words that name no variable."""
    parts = urlsplit(constants.ENDPOINT)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        return f"HF_ENDPOINT is {constants.ENDPOINT}, not a URL such as https://huggingface.co"
    if re.fullmatch(r"[!-~]*", get_token() or "") is None:
        return f"the token that is set holds a character that no token has; {LOG_IN}"
    return None


def passing(error: BaseException) -> TryAgainError | None:
    """What a failure means that may pass; None if it is none of these."""
    match error:
        case OfflineModeIsEnabled():
            return None
        case HfHubHTTPError():
            if error.response.status_code not in PASSING:
                return None
            return TryAgainError(answer(error), after=asked_wait(error.response.headers))
    return connection_failed(error) if isinstance(error, TRANSPORT_ERRORS) else None


def answer(error: HfHubHTTPError) -> str:
    """The status and what the Hub says, in one line."""
    said = error.server_message or error.response.reason_phrase
    return f"the Hub answers {error.response.status_code} {one_line(said)}"


def connection_failed(error: BaseException) -> TryAgainError:
    reason = str(error) or type(error).__name__
    if isinstance(error, JSONDecodeError):
        reason = "its answer is not JSON; is a proxy between?"
    return TryAgainError(f"the connection to {constants.ENDPOINT} failed ({reason})")
