"""ASGI middleware with security headers (content security policy), request validation and a rate limit."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

_RULES = {
    # Pages may only load from and connect to this server, whatever ends up in them.
    "default-src": "'self'",
    # Only script files of this server and the inline scripts of Gradio's template, by their hashes, may run: no
    # injected script, no event handler attribute, no javascript: URL. 'unsafe-eval' allows none of these; Gradio's HTML
    # component and its `js=` need it for `Function`.
    "script-src": "'self' 'unsafe-eval'",
    "script-src-attr": "'none'",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "media-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "connect-src": "'self' blob: data:",
    "worker-src": "'self' blob:",
    "object-src": "'none'",
    "base-uri": "'self'",
    "form-action": "'self'",
}
FILES = "default-src 'none'; sandbox"
"""Policy for uploaded files: opened in a tab, they cannot act as pages of this server."""
HEADERS = {
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
_INLINE = re.compile(rb"<script(?![^>]*\ssrc\s*=)[^>]*>(.*?)</script", re.DOTALL | re.IGNORECASE)
BODY_MB = 8
"""Maximum request body, in MB; files are uploaded separately."""
WORK = ("/queue/join", "/call/", "/upload", "/api/", "/run/")
"""Requests that count against the rate limit; the rest are pages and streams."""
CALLS = ("/queue/join", "/call/", "/api/", "/run/")
"""Requests with a JSON body: function calls."""
ADDRESSES = 4096


class Guard:
    """ASGI middleware that validates and rate-limits requests and adds security headers.

    Args:
        per_minute: requests per minute and address; 0: unlimited.
        endpoints: parameter names of each API endpoint; the first is required.
        behind_proxy: trust the client address in X-Forwarded-For. Only behind a proxy: clients can forge that header.
    """

    def __init__(
        self,
        app: Any,
        per_minute: int = 0,
        behind_proxy: bool = False,
        endpoints: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    ):
        self.app, self.per_minute, self.behind_proxy = app, per_minute, behind_proxy
        self.endpoints = endpoints
        self._recent: OrderedDict[str, deque[float]] = OrderedDict()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "POST" and self.per_minute and any(part in scope["path"] for part in WORK):
            wait = self._wait(self._address(scope))
            if wait > 0:
                await _refuse(send, wait)
                return

        if scope["method"] == "POST" and any(part in scope["path"] for part in CALLS):
            body = await _body(receive)
            if problem := refused(scope["path"], body, self.endpoints):
                await _answer(send, 422, problem)
                return
            receive = _replay(completed(scope["path"], body, self.endpoints), receive)
        await self.app(scope, receive, _WithHeaders(scope["path"], send))

    def _address(self, scope: dict[str, Any]) -> str:
        if self.behind_proxy:
            headers = dict(scope["headers"])
            # The proxy appends its entry last.
            forwarded = headers.get(b"x-forwarded-for", b"").decode("latin-1").split(",")[-1].strip()
            if forwarded:
                return forwarded
        return (scope.get("client") or ("unknown",))[0]

    def _wait(self, address: str) -> float:
        """Returns the seconds until this address may send again; if 0, counts the request."""
        now = time.monotonic()
        times = self._recent.setdefault(address, deque())
        self._recent.move_to_end(address)
        while len(self._recent) > ADDRESSES:
            self._recent.popitem(last=False)
        while times and times[0] < now - 60:
            times.popleft()
        if len(times) >= self.per_minute:
            return 60 - (now - times[0])
        times.append(now)
        return 0.0


def policy(page: bytes = b"") -> str:
    """Builds the content security policy of a page, allowing its inline scripts by hash.

    Args:
        page: HTML as rendered by the server.
    """
    bodies = [match.replace(b"\r\n", b"\n") for match in _INLINE.findall(page)]
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(body).digest()).decode()}'" for body in dict.fromkeys(bodies)]
    rules = {**_RULES, "script-src": " ".join([_RULES["script-src"], *hashes])}
    return "; ".join(f"{name} {value}" for name, value in rules.items())


class _WithHeaders:
    """Adds the headers to a response; buffers HTML pages, because their policy contains hashes of the content."""

    def __init__(self, path: str, send: Any):
        self.path, self.send = path, send
        self.start: dict[str, Any] | None = None
        self.page = bytearray()

    async def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            if kind.startswith(b"text/html") and not self._is_file():
                self.start = message
            else:
                await self.send(self._with(message, FILES if self._is_file() else policy()))
        elif message["type"] == "http.response.body" and self.start is not None:
            self.page += message.get("body", b"")
            if not message.get("more_body"):
                await self.send(self._with(self.start, policy(bytes(self.page))))
                await self.send({"type": "http.response.body", "body": bytes(self.page)})
        else:
            await self.send(message)

    def _is_file(self) -> bool:
        return "/file=" in self.path or "/file/" in self.path

    def _with(self, message: dict[str, Any], rules: str) -> dict[str, Any]:
        added = {**HEADERS, "content-security-policy": rules}
        kept = [(name, value) for name, value in message["headers"] if name.lower().decode() not in added]
        return {**message, "headers": [*kept, *((name.encode(), value.encode()) for name, value in added.items())]}


def refused(path: str, body: bytes, endpoints: Mapping[str, tuple[str, ...]] = MappingProxyType({})) -> str:
    """Returns why the body of a call is rejected, or "" if it is valid.

    Strict JSON: no NaN, Infinity, overflowing numbers, duplicate or unknown fields.
    """
    if len(body) > BODY_MB * 2**20:
        return f"the request is larger than {BODY_MB} MB; upload files first and name them"
    try:
        data = json.loads(body or b"{}", parse_float=_number, parse_constant=_no_constant, object_pairs_hook=_unique)
    except _Refused as problem:
        return str(problem)
    except (ValueError, RecursionError):
        return "the request is not valid JSON"
    if not isinstance(data, dict):
        return "the request must be a JSON object"
    name = path.rstrip("/").rpartition("/")[2]
    parameters = endpoints.get(name)
    if "/call/v2/" in path:
        if parameters is None:
            return ""
        if unknown := sorted(set(data) - set(parameters)):
            return f"unknown field {unknown[0]!r}; {name} has {', '.join(parameters)}"
        return f"{name} needs {parameters[0]}" if parameters and data.get(parameters[0]) is None else ""
    known = FIELDS_SIMPLE if "/call/" in path else FIELDS
    if unknown := sorted(set(data) - known):
        return f"unknown field {unknown[0]!r}; a call has {', '.join(sorted(known))}"
    given = data.get("data")
    if parameters is not None and (not isinstance(given, list) or len(given) not in _counts(parameters)):
        return f"{name} needs {len(parameters)} values in data, null for omitted ones: {', '.join(parameters)}"
    return ""


LATER = "anyway"
"""A parameter that came later: a call that ends before it is as it was before."""


def _counts(parameters: Sequence[str]) -> tuple[int, ...]:
    """Returns how many values a call may have."""
    return (len(parameters), len(parameters) - (parameters[-1:] == (LATER,)))


def completed(path: str, body: bytes, endpoints: Mapping[str, tuple[str, ...]]) -> bytes:
    """Returns the body of an accepted call with null for a parameter that was added later."""
    parameters = endpoints.get(path.rstrip("/").rpartition("/")[2])
    if parameters is None or "/call/v2/" in path or parameters[-1:] != (LATER,):
        return body
    data = json.loads(body)
    if len(data["data"]) == len(parameters):
        return body
    return json.dumps({**data, "data": [*data["data"], None]}).encode()


FIELDS_SIMPLE = {"data", "session_hash", "oauth_token"}
FIELDS = FIELDS_SIMPLE | {
    *("event_id", "event_data", "fn_index", "trigger_id", "simple_format", "batched", "api_name", "request"),
    *("time_limit", "batch_trigger_ids"),
}


class _Refused(ValueError):
    """JSON that Python's parser accepts but the app rejects."""


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"the number {text[:40]} is too large")
    return value


def _no_constant(text: str) -> float:
    raise _Refused(f"{text} is not a JSON number; omit the field or pass null")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Refused("a field is given twice")
    return found


async def _body(receive: Any) -> bytes:
    """Reads the body of a request, up to just beyond the size limit."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or not message.get("more_body") or len(body) > BODY_MB * 2**20:
            return bytes(body)


def _replay(body: bytes, receive: Any) -> Any:
    """Returns a `receive` that replays the body, then continues with the original."""
    given = False

    async def again() -> dict[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Any, wait: float) -> None:
    seconds = str(max(round(wait), 1))
    text = f"Too many requests from your address; try again in {seconds} seconds."
    await _answer(send, 429, text, [(b"retry-after", seconds.encode())])


async def _answer(send: Any, status: int, text: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """Sends an error in the format of Gradio, which its clients display."""
    body = json.dumps({"detail": text}).encode()
    headers = [(b"content-type", b"application/json"), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
