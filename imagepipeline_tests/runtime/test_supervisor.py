"""The supervisor chooses a port and keeps its state; end_to_end tests a running stack."""

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


def leave_connection_in_time_wait():
    """Returns a port with a connection in TIME_WAIT, on which no process listens."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        with closing(socket.create_connection(("127.0.0.1", port))) as client:
            accepted, _ = server.accept()
            accepted.close()  # the side that closes first has TIME_WAIT
            assert client.recv(1) == b""
    with closing(socket.socket()) as strict, pytest.raises(OSError, match="in use"):
        strict.bind(("127.0.0.1", port))
    return port


def test_the_ui_keeps_its_port_despite_connections_in_time_wait(settings):
    port = leave_connection_in_time_wait()
    assert supervisor._choose_port(settings, port) == port
    assert (
        supervisor._choose_port(settings.model_copy(update={"webserver_port": port}), None) == port
    )


def test_the_ui_changes_its_port_only_if_another_process_listens_there(settings):
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
def test_a_lock_file_of_another_version_is_accepted(settings, content):
    settings.home.mkdir()
    (settings.home / "stack.lock").write_text(content, errors="surrogateescape")
    lock, port = supervisor._acquire_lock(settings)
    assert port is None
    supervisor.os.close(lock)
