"""Between the network and the app: headers that keep pages to this server, and a limit on requests."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from typing import Any

# Pages may load from and talk to this server alone, whatever ends up in them. Gradio needs inline code and styles.
POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' ws: wss: blob: data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    ]
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
WORK = ("/queue/join", "/call/", "/upload", "/api/", "/run/")
"""Requests that cost something; the rest are pages and streams."""
ADDRESSES = 4096


class Guard:
    """ASGI middleware.

    Args:
        per_minute: requests for work that one address may make in a minute; 0: any number.
        behind_proxy: take the address that the proxy in front saw. Only there: anybody can write that header.
    """

    def __init__(self, app: Any, per_minute: int = 0, behind_proxy: bool = False):
        self.app, self.per_minute, self.behind_proxy = app, per_minute, behind_proxy
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

        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in present]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await self.app(scope, receive, with_headers)

    def _address(self, scope: dict[str, Any]) -> str:
        if self.behind_proxy:
            headers = dict(scope["headers"])
            # The last entry is the one that the proxy itself wrote.
            forwarded = headers.get(b"x-forwarded-for", b"").decode("latin-1").split(",")[-1].strip()
            if forwarded:
                return forwarded
        return (scope.get("client") or ("unknown",))[0]

    def _wait(self, address: str) -> float:
        """Seconds until this address may ask again; 0 if it may now, which is then counted."""
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


async def _refuse(send: Any, wait: float) -> None:
    seconds = str(max(round(wait), 1))
    body = f'{{"detail": "Too many requests from your address; try again in {seconds} seconds."}}'.encode()
    headers = [(b"content-type", b"application/json"), (b"retry-after", seconds.encode())]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": body})
