"""Dagster's webserver, answering its own pages only: `python -m imagepipeline.runtime.webserver -p PORT -w FILE`.

Takes the arguments of `dagster-webserver`. As shipped, that runs whatever mutation a foreign page hides in an address
or sends as plain text, for whoever opens such a page on the machine where it listens. `deploy/Caddyfile` checks the
same for a production stack.
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
WRONG_HOST, FOREIGN, DISGUISED, WRONG_METHOD = (
    (421, "This server answers for this machine only: open it as localhost."),
    (403, "This page may not ask that."),
    (405, "Queries are JSON, sent by POST."),
    (405, "Only GET, HEAD and POST are answered."),
)


class OwnPagesOnly:
    """An ASGI application that passes on what its own pages ask, and refuses the rest.

    With `is_local` only names of this machine are answered to, as a foreign name may be made to point here.
    """

    def __init__(self, served: App, is_local: bool) -> None:
        self._app = served
        self._is_local = is_local

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request, or lets one socket be opened."""
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
        """The status and sentence a request is refused with, or None."""
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._is_local and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return WRONG_HOST
        if origin is not None and urlsplit(origin).netloc != host:
            return FOREIGN
        is_query = posixpath.normpath("/" + scope["path"].lstrip("/")).startswith("/graphql")
        if scope["type"] == "websocket":  # a browser says where it comes from
            return None if origin is not None else FOREIGN
        if scope["method"] not in METHODS:
            return WRONG_METHOD
        is_json = headers.get("content-type", "").startswith("application/json")
        return DISGUISED if is_query and not (scope["method"] == "POST" and is_json) else None


def main() -> None:
    """Serves until it is stopped."""
    make = app.create_app_from_workspace_process_context
    is_local = is_loopback(Settings.load().webserver_host)

    def make_guarded(*args: Any, **kwargs: Any) -> OwnPagesOnly:
        return OwnPagesOnly(make(*args, **kwargs), is_local)

    vars(cli)["create_app_from_workspace_process_context"] = (
        make_guarded  # there is no setting for middleware
    )
    cli.main()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
