"""The supervisor's choices; that it starts, watches and drains is shown end to end."""

import json
import socket
from contextlib import closing

import pytest

from imagepipeline.errors import StackError
from imagepipeline.runtime import supervisor
from imagepipeline.settings import Settings


@pytest.fixture
def settings(tmp_path):
    return Settings.load({"IMAGEPIPELINE_HOME": str(tmp_path / "home")})


def leave_lingering():
    """A port where nobody listens any more, with a connection that TIME_WAIT keeps."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        with closing(socket.create_connection(("127.0.0.1", port))) as client:
            accepted, _ = server.accept()
            accepted.close()  # whoever closes first keeps it
            assert client.recv(1) == b""
    with closing(socket.socket()) as strict, pytest.raises(OSError, match="in use"):
        strict.bind(("127.0.0.1", port))
    return port


def test_the_ui_keeps_its_port_though_old_connections_linger(settings):
    port = leave_lingering()
    assert supervisor._choose_port(settings, port) == port
    assert (
        supervisor._choose_port(settings.model_copy(update={"webserver_port": port}), None) == port
    )


def test_the_ui_moves_only_where_somebody_listens(settings):
    for host in ("127.0.0.1", "0.0.0.0"):
        with closing(socket.create_server((host, 0))) as server:
            taken = server.getsockname()[1]
            assert supervisor._choose_port(settings, taken) != taken
            wanted = settings.model_copy(update={"webserver_port": taken})
            with pytest.raises(StackError, match=f"port {taken} .*IMAGEPIPELINE_WEBSERVER_PORT"):
                supervisor._choose_port(wanted, None)


def test_the_port_of_a_home_is_remembered(settings):
    lock, port = supervisor._acquire_lock(settings)
    assert port is None
    supervisor._write_state(lock, "http://127.0.0.1:45678", 45678)
    with pytest.raises(StackError, match="already uses"):
        supervisor._acquire_lock(settings)
    supervisor.os.close(lock)
    lock, port = supervisor._acquire_lock(settings)
    assert port == 45678
    state = json.loads((settings.home / "stack.lock").read_text())
    assert (state["webserver_url"], state["webserver_port"]) == (None, 45678)
    supervisor.os.close(lock)


@pytest.mark.parametrize(
    "content", ["", "x", "[]", '{"webserver_port": "3000"}', '{"pid": 1}', "\udcff"]
)
def test_a_lock_file_of_another_version_does_not_matter(settings, content):
    settings.home.mkdir()
    (settings.home / "stack.lock").write_text(content, errors="surrogateescape")
    lock, port = supervisor._acquire_lock(settings)
    assert port is None
    supervisor.os.close(lock)
