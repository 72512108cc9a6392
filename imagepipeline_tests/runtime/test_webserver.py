"""The webserver answers requests from its own pages only."""

import http.client
import inspect
import socket
import threading
from contextlib import contextmanager

import pytest
import uvicorn
from dagster_webserver import cli

from imagepipeline.runtime.webserver import SameOriginMiddleware

JSON = {"Content-Type": "application/json"}


async def answer(scope, receive, send):
    """Answers every request with its path: an application that checks nothing."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


@contextmanager
def serving(is_local):
    server = uvicorn.Server(
        uvicorn.Config(SameOriginMiddleware(answer, is_local), lifespan="off", log_level="error")
    )
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture(scope="module")
def port():
    with serving(is_local=True) as port:
        yield port


def ask(port, method, path, headers=(), body=b""):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, {"Host": f"localhost:{port}", **dict(headers)})
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/", {}),
        ("GET", "/runs", {"Host": "127.0.0.1"}),
        ("GET", "/server_info", {"Host": "[::1]:3000"}),
        ("POST", "/graphql", JSON),
        ("POST", "/graphql", JSON | {"Host": "localhost:3000", "Origin": "http://localhost:3000"}),
        ("POST", "/graphql", {"Content-Type": "application/json; charset=utf-8"}),
    ],
)
def test_requests_of_its_own_pages_and_of_scripts_are_answered(port, method, path, headers):
    assert ask(port, method, path, headers) == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/graphql?query=mutation", {}, 405),
        ("GET", "/%67raphql?query=mutation", {}, 405),
        ("GET", "//graphql?query=mutation", {}, 405),
        ("POST", "/graphql", {"Content-Type": "text/plain"}, 405),
        ("POST", "/graphql", {"Content-Type": "text/plain; application/json"}, 405),
        ("POST", "/graphql", {"Content-Type": "application/x-www-form-urlencoded"}, 405),
        ("POST", "/graphql", {}, 405),
        ("POST", "/graphql", JSON | {"Origin": "https://evil.example"}, 403),
        ("POST", "/graphql", JSON | {"Origin": "null"}, 403),
        ("POST", "/graphql", JSON | {"Origin": "http://localhost:1"}, 403),
        ("POST", "/report_asset_materialization/x", {"Origin": "https://evil.example"}, 403),
        ("POST", "/graphql", JSON | {"Host": "evil.example"}, 421),
        ("POST", "/graphql", JSON | {"Host": "localhost.evil.example"}, 421),
        ("POST", "/graphql", JSON | {"Host": "127.0.0.1.nip.example:3000"}, 421),
        ("GET", "/", {"Host": "evil.example:3000"}, 421),
        ("DELETE", "/", {}, 405),
        ("OPTIONS", "/graphql", {"Origin": "https://evil.example"}, 403),
    ],
)
def test_requests_that_a_foreign_page_can_make_are_refused(port, method, path, headers, status):
    assert ask(port, method, path, headers) == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://localhost:3000", 101), ("https://evil.example", 403), (None, 403)],
)
def test_websockets_are_opened_for_its_own_pages_only(port, origin, status):
    headers = {
        "Host": "localhost:3000",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Version": "13",
    }
    assert ask(port, "GET", "/graphql", headers | ({"Origin": origin} if origin else {})) == status


def test_behind_a_proxy_the_host_is_not_checked():
    with serving(is_local=False) as port:
        headers = {"Host": "images.example.com", "Origin": "https://images.example.com"}
        assert ask(port, "POST", "/graphql", JSON | headers) == 200
        assert (
            ask(port, "POST", "/graphql", JSON | headers | {"Origin": "https://evil.example"})
            == 403
        )


def test_dagsters_webserver_still_creates_its_application_where_we_wrap_it():
    source = inspect.getsource(cli.host_dagster_ui_with_workspace_process_context)
    assert "app = create_app_from_workspace_process_context(" in source
