"""Dagster's webserver, protected from cross-site requests.

    python -m imagepipeline.runtime.webserver -p PORT -w FILE

Takes the arguments of `dagster-webserver`. The original webserver executes GraphQL mutations that
any website sends through a visitor's browser, as a URL or as plain text, if the visitor's machine
can reach the webserver. In a production stack, `deploy/Caddyfile` makes the same checks.
"""

import posixpath
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from dagster_webserver import app, cli

from imagepipeline.settings import Settings, is_loopback

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

METHODS = ("GET", "HEAD", "POST")
WRONG_HOST, CROSS_ORIGIN, NOT_JSON, WRONG_METHOD = (
    (421, "This server answers only to the names of this machine: open it as localhost."),
    (403, "Cross-origin requests are refused."),
    (405, "GraphQL queries must be JSON, sent by POST."),
    (405, "Only GET, HEAD and POST are supported."),
)


class SameOriginMiddleware:
    """ASGI middleware that passes on requests of the webserver's own pages and refuses all others.

    With `is_local`, the Host header must name this machine, because an attacker can make any other
    name resolve to its address (DNS rebinding).
    """

    def __init__(self, served: App, is_local: bool) -> None:
        self._app = served
        self._is_local = is_local

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handles one request, or the opening of one websocket."""
        refusal = self.find_refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, text = refusal
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": text.encode()})

    def find_refusal(self, scope: Message) -> tuple[int, str] | None:
        """Returns the status and text with which a request is refused, or None if it is allowed."""
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._is_local and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return WRONG_HOST
        if origin is not None and urlsplit(origin).netloc != host:
            return CROSS_ORIGIN
        is_query = posixpath.normpath("/" + scope["path"].lstrip("/")).startswith("/graphql")
        if scope["type"] == "websocket":  # browsers always send an Origin when they open one
            return None if origin is not None else CROSS_ORIGIN
        if scope["method"] not in METHODS:
            return WRONG_METHOD
        is_json = headers.get("content-type", "").startswith("application/json")
        return NOT_JSON if is_query and not (scope["method"] == "POST" and is_json) else None


def main() -> None:
    """Serves the UI until it is stopped."""
    make = app.create_app_from_workspace_process_context
    is_local = is_loopback(Settings.load().webserver_host)

    def make_protected(*args: Any, **kwargs: Any) -> SameOriginMiddleware:
        return SameOriginMiddleware(make(*args, **kwargs), is_local)

    # Dagster has no setting for middleware.
    vars(cli)["create_app_from_workspace_process_context"] = make_protected
    cli.main()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
