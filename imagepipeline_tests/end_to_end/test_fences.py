"""The servers of docker-compose.yml withstand attacks when run with its commands and files."""

import contextlib
import http.client
import os
import re
import socket
import ssl
import tempfile
import time
from base64 import b64encode
from pathlib import Path

import pytest
import redis
import yaml

from imagepipeline.stores import uploads
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline_tests.end_to_end.composed import ROOT, Composed

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def stack():
    with tempfile.TemporaryDirectory(prefix="ip", dir="/tmp") as folder:
        stack = Composed(Path(folder), "postgresql://?host=/nowhere", {})
        try:
            for name in ("redis", "proxy"):
                stack.start_service(name)
            yield stack
        finally:
            stack.stop()


@pytest.fixture
def uploader(stack):
    return redis.Redis.from_url(stack.read_secret("redis_uploader_url"))


@pytest.fixture
def pipeline_queue(stack):
    queue = UploadQueue(stack.read_secret("redis_pipeline_url"))
    yield queue
    queue.redis.delete(queue.wait_key, queue.dead_key)


@pytest.fixture
def admin(stack):
    return redis.Redis(
        port=stack.ports["redis"],
        username="admin",
        password=stack.read_secret("redis_admin_password"),
    )


def test_redis_has_one_database(stack, admin):
    url = stack.read_secret("redis_uploader_url")
    assert url.endswith("/0")
    with pytest.raises(redis.ResponseError, match="DB index is out of range"):
        redis.Redis.from_url(url.removesuffix("0") + "1").lpush("image-processing:wait", "x")
    assert admin.config_get("databases") == {"databases": "1"}


def test_entries_and_messages_are_accepted_but_far_longer_values_are_refused(
    uploader, pipeline_queue
):
    # The limit of an entry, and three times the size of a message between our processes.
    for length in (4_096, 300_000):
        uploader.lpush("image-processing:wait", b"x" * length)
    with pytest.raises((redis.ResponseError, redis.ConnectionError)):
        uploader.lpush("image-processing:wait", b"x" * 1_100_000)
    assert pipeline_queue.count()["waiting"] == 2


def test_one_command_cannot_fill_the_server(uploader, admin, pipeline_queue):
    """The command is longer than the memory of the container."""
    admin.config_resetstat()
    with pytest.raises((redis.ResponseError, redis.ConnectionError, OSError)):
        uploader.lpush("image-processing:wait", *([b"x" * 900_000] * 400))
    assert admin.info("memory")["used_memory_peak"] < 250_000_000
    assert pipeline_queue.count()["waiting"] == 0


def test_a_list_full_of_the_longest_entries_is_drained_within_the_containers_memory(
    uploader, admin, pipeline_queue
):
    admin.config_resetstat()
    with contextlib.suppress(redis.exceptions.OutOfMemoryError):
        for number in range(400):
            uploader.lpush("image-processing:wait", b"%d" % number + b"x" * 1_000_000)
    assert 150 < pipeline_queue.count()["waiting"] < 400
    while entries := pipeline_queue.read(500):
        pipeline_queue.acknowledge(entries)
    assert pipeline_queue.count()["waiting"] == 0
    assert admin.info("memory")["used_memory_peak"] < 270_000_000


def test_no_service_has_the_password_of_the_administrators_redis_user(
    admin, uploader, pipeline_queue
):
    assert admin.acl_whoami() == "admin"
    assert admin.info("memory")["maxmemory_policy"] == "noeviction"
    users = {"admin", "dagster", "default", "pipeline", "reader", "uploader"}
    assert set(admin.acl_users()) == users
    assert "off" in admin.acl_getuser("default")["flags"]
    for client in (uploader, pipeline_queue.redis):
        for refused in (
            client.acl_list,
            client.config_get,
            client.client_list,
            client.flushall,
            client.shutdown,
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                refused()
    given = {
        name for service in COMPOSE["services"].values() for name in service.get("secrets", [])
    }
    assert given <= COMPOSE["secrets"].keys()
    assert not [name for name in COMPOSE["secrets"] if "admin" in name]


def test_the_pipelines_redis_user_may_trim_the_list_of_unreadable_entries(
    pipeline_queue, monkeypatch
):
    monkeypatch.setattr(uploads, "MAX_DEAD", 2)
    for number in range(5):
        pipeline_queue.dead_letter(b"?%d" % number, 1, "why")
    assert (pipeline_queue.count()["dead"], pipeline_queue.count_dropped()) == (2, 3)
    for letter in pipeline_queue.list_dead():
        pipeline_queue.discard_dead(letter)
    assert pipeline_queue.count_dropped() == 0


def ask(connection, password):
    user = b64encode(f"admin:{password}".encode()).decode()
    connection.request("GET", "/", headers={"Authorization": f"Basic {user}"})
    answer = connection.getresponse()
    answer.read()
    return answer


def find_caddy(process):
    """Waits until the shell has executed Caddy; returns the process ID."""
    while Path(f"/proc/{process.pid}/comm").read_text() != "caddy\n":
        time.sleep(0.01)
    return process.pid


def count_cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="CPU time is read from /proc")
def test_a_flood_of_wrong_passwords_uses_little_cpu_time(stack):
    assert len(stack.read_secret("ui_password")) >= 32  # random, so a fast hash is safe
    pid = find_caddy(stack.running["proxy"])
    before_seconds = count_cpu_seconds(pid)
    connection = http.client.HTTPConnection("127.0.0.1", stack.ports["proxy"], timeout=60)
    assert {ask(connection, f"wrong{number}").status for number in range(50)} == {401}
    assert (count_cpu_seconds(pid) - before_seconds) / 50 < 0.02
    # Accepted, but the webserver behind the proxy is not running.
    assert ask(connection, stack.read_secret("ui_password")).status == 502
    connection.close()


@pytest.mark.parametrize(("host", "has_hsts"), [("images.localhost", True), ("localhost", False)])
def test_browsers_are_told_to_use_only_https_for_a_real_host(host, has_hsts):
    """Uses Caddy's own certificate, on loopback, and without its redirects on port 80."""
    with tempfile.TemporaryDirectory(prefix="ip", dir="/tmp") as folder:
        stack = Composed(Path(folder), "postgresql://?host=/nowhere", {})
        port = stack.ports["proxy"]
        stack.site = f"https://{host}:{port}"
        here = Path(folder, "Caddyfile")
        text = (ROOT / "deploy" / "Caddyfile").read_text()
        here.write_text(
            text.replace(
                "admin off", "admin off\n\tdefault_bind 127.0.0.1\n\tauto_https disable_redirects"
            )
        )
        proxy = stack.services["proxy"]
        proxy["command"] = [
            word.replace("/etc/caddy/Caddyfile", str(here)) for word in proxy["command"]
        ]
        stack.start_service("proxy")
        try:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = http.client.HTTPSConnection(host, port, timeout=30, context=context)
            there = socket.create_connection(("127.0.0.1", port), timeout=30)
            connection.sock = context.wrap_socket(there, server_hostname=host)
            answer = ask(connection, "wrong")
            assert answer.status == 401
            assert answer.headers["Strict-Transport-Security"] == (
                "max-age=31536000" if has_hsts else None
            )
            connection.close()
        finally:
            stack.stop()


def test_the_operations_page_pins_each_image_by_its_digest():
    images = {name: service["image"] for name, service in COMPOSE["services"].items()}
    ours = [name for name, service in COMPOSE["services"].items() if "build" in service]
    argument = COMPOSE["x-ours"]["build"]["args"]["PYTHON"]
    operations = (ROOT / "docs" / "operations.md").read_text()
    for image in [argument, *(image for name, image in images.items() if name not in ours)]:
        variable, default = re.fullmatch(
            r"\$\{([A-Z]+_IMAGE):-([a-z/]+:[a-z0-9.-]+)\}", image
        ).groups()
        assert f"{variable}={default}@sha256:" in operations
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"ARG PYTHON={re.search(':-(.*)}', argument)[1]}" in dockerfile
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) == {"${PYTHON}"}
