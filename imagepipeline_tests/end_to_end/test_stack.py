"""The local stack works from the first push to a clean stop, as used by people."""

import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
import redis
from PIL import Image

from imagepipeline.runtime.services import answers_http
from imagepipeline.settings import Settings
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.retention import Retention
from imagepipeline.stores.vectors import EmbeddingIndex
from imagepipeline_tests.conftest import PHOTOS
from imagepipeline_tests.end_to_end.processes import find_port, find_process, find_service
from imagepipeline_tests.end_to_end.secrets_in_memory import SECRETS, check_secrets

pytestmark = pytest.mark.stack

COMMAND = Path(sys.executable).parent / "imagepipeline"
PATIENCE_SECONDS = 180


@pytest.fixture
def home(monkeypatch):
    """A home with an awkward name and environment, but a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="ip", dir="/tmp") as folder:
        home = Path(folder, "a b#c%2Fdé'\"")
        (Path(folder) / ("t" * 110)).mkdir()
        monkeypatch.setenv("TMPDIR", str(Path(folder) / ("t" * 110)))
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv("REDIS_PORT", "tcp://10.0.0.1:6379")
        monkeypatch.setenv("DAGSTER_GRPC_PORT", "tcp://10.0.0.1:4000")
        monkeypatch.setenv("IMAGEPIPELINE_HOME", str(home))
        # Other tests run stacks at the same time.
        monkeypatch.setenv("IMAGEPIPELINE_WEBSERVER_PORT", str(find_port()))
        yield home
        assert {path.name for path in Path(folder).iterdir()} == {home.name, "t" * 110}


def run(*arguments, check=True):
    result = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, check=False)
    if check:
        assert result.returncode == 0, result.stderr
    return result


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.5)
    raise AssertionError(
        f"not within {PATIENCE_SECONDS} s: {run('status', '--json', check=False).stdout}"
    )


def counts():
    """Returns the number of images by status: at once, while a command takes half a second."""
    return Catalogue(Settings.load().database_url).count()


def ask(url, query):
    request = urllib.request.Request(
        f"{url}/graphql",
        json.dumps({"query": query}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return json.load(answer)["data"]


def stop_sensor(url, name):
    nodes = ask(
        url,
        "{ repositoriesOrError { ... on RepositoryConnection { nodes { sensors { name id } } } } }",
    )
    [repository] = nodes["repositoriesOrError"]["nodes"]
    [identity] = [sensor["id"] for sensor in repository["sensors"] if sensor["name"] == name]
    stop = (
        "mutation { stopSensor(id: %s) "
        "{ ... on StopSensorMutationResult { instigationState { status } } } }"
    )
    return ask(url, stop % json.dumps(identity))


def webserver_url():
    return f"http://127.0.0.1:{os.environ['IMAGEPIPELINE_WEBSERVER_PORT']}"


def count_partitions():
    """Returns how many partitions of each of an image's assets the UI calls materialized."""
    query = "{ assetNodes { isPartitioned partitionStats { numMaterialized } } }"
    nodes = ask(webserver_url(), query)["assetNodes"]
    return [node["partitionStats"]["numMaterialized"] for node in nodes if node["isPartitioned"]]


def processes_of(home):
    """Returns the command lines of all processes whose environment contains the home."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (
                str(home).encode() in (path / "environ").read_bytes()
                and int(path.name) != os.getpid()
            ):
                found.append((path / "cmdline").read_bytes())
        except OSError:
            continue
    return found


def test_from_a_plain_push_to_a_search_and_a_clean_stop(home):
    originals = home / "storage" / "original"
    with subprocess.Popen(
        [COMMAND, "up", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as stack:
        try:
            addresses = json.loads(stack.stdout.readline())
            assert run("up", check=False).returncode == 4  # the home is in use

            (originals / "cat.jpg").write_bytes((PHOTOS / "cat.jpg").read_bytes())
            (originals / "deep").mkdir()
            (originals / "deep" / "espresso.jpeg").write_bytes((PHOTOS / "coffee.jpg").read_bytes())
            (originals / "broken.jpg").write_bytes((PHOTOS / "coffee.jpg").read_bytes()[:5000])
            client = redis.Redis(unix_socket_path=addresses["redis"])
            client.lpush("image-processing:wait", "cat")
            client.lpush("image-processing:wait", "broken")
            client.lpush(
                "image-processing:wait", '{"imageId": "cup", "path": "original/deep/espresso.jpeg"}'
            )
            client.lpush("image-processing:wait", "../../etc/passwd")

            wait_until(lambda: counts()["completed"] == 2 and counts()["failed"] == 1)
            expected = {
                "waiting": 0,
                "pending": 0,
                "processing": 0,
                "completed": 2,
                "failed": 1,
                "dead": 1,
                "failures": {"truncated": 1},
            }
            assert json.loads(run("status", "--json").stdout).items() >= expected.items()

            broken = json.loads(run("status", "broken", "--json").stdout)
            assert (broken["reason"], broken["attempts"]) == ("truncated", 1)
            cup = json.loads(run("status", "cup", "--json").stdout)
            with closing(sqlite3.connect(home / "dagster" / "storage" / "event_log.db")) as log:
                count = "SELECT count(*) FROM event_logs WHERE run_id = ?"
                assert log.execute(count, [cup["run_id"]]).fetchone() == (22,)  # all are read
            assert (cup["status"], cup["generation"], cup["attempts"]) == ("completed", 1, 1)
            assert {variant["path"] for variant in cup["variants"]} >= {
                "variants/deep/espresso-sm.webp"
            }
            for variant in cup["variants"]:
                content = (home / "storage" / variant["path"]).read_bytes()
                image = Image.open(io.BytesIO(content))
                image.load()
                assert (image.format.lower(), *image.size) == (
                    variant["format"],
                    variant["width"],
                    variant["height"],
                )
                assert len(content) == variant["size"]
            row = EmbeddingIndex(str(home / "lancedb")).get(
                "cup", cup["made_by"]["embedding"]["version"]
            )
            assert row["text"].startswith(cup["metadata"]["description"])

            asked = ask(
                addresses["webserver_url"],
                "{ assetNodes { assetKey { path } partitionStats "
                "{ numMaterialized numFailed numPartitions } } }",
            )
            stats = {
                node["assetKey"]["path"][0]: node["partitionStats"] for node in asked["assetNodes"]
            }
            # A rejected upload is no failure of the pipeline.
            assert stats["metadata"] == {"numMaterialized": 2, "numFailed": 0, "numPartitions": 3}
            assert stats["embedding"]["numMaterialized"] == 2

            found = json.loads(run("search", "a cup of coffee", "--json").stdout)
            assert found[0]["image_id"] == "cup"

            resident = find_process(home, b"imagepipeline.resident")
            os.kill(resident, signal.SIGKILL)  # restarted without a failure
            pushed = run("push", str(PHOTOS / "rocket.jpg"), "--id", "rocket", "--wait", "--json")
            assert find_process(home, b"imagepipeline.resident") != resident
            assert json.loads(pushed.stdout)["images"][0]["status"] == "completed"
            again = run(
                "push", str(originals / "broken.jpg"), "--id", "broken", "--wait", check=False
            )
            assert again.returncode == 1

            assert run("doctor").returncode == 0
            stopped = stop_sensor(addresses["webserver_url"], "notification_sensor")
            assert stopped["stopSensor"]["instigationState"]["status"] == "STOPPED"
            found = [
                json.loads(line)
                for line in run("doctor", "--json", check=False).stdout.splitlines()
            ]
            [problem] = [finding for finding in found if not finding["is_well"]]
            assert problem["name"] == "sensors"
            assert "notification_sensor is stopped" in problem["sentence"]

            for _ in range(2):  # as when a terminal is closed
                os.kill(stack.pid, signal.SIGHUP)
            assert stack.wait(60) == 0
        finally:
            stack.kill()
    wait_until(lambda: not processes_of(home))  # the forkserver ends last
    assert json.loads((run("status", "broken", "--json")).stdout)["generation"] == 2


def test_a_stopped_stack_continues_later_prunes_beside_its_work_and_restores(home, monkeypatch):
    local = {"IMAGEPIPELINE_VISION": "local", "IMAGEPIPELINE_EMBEDDING": "local"}
    for name, value in (SECRETS | local).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IMAGEPIPELINE_WEBHOOK_URL", "https://127.0.0.1:9/hook")

    def start():
        stack = subprocess.Popen([COMMAND, "up"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert stack.stdout.readline()
        stack.stdout.close()  # as `up | head -1` does
        stack.stderr.close()
        return stack

    def is_up():
        return answers_http(f"{webserver_url()}/server_info")

    stack = start()
    try:
        if sys.platform == "linux":
            check_secrets(stack.pid)
        webserver = find_service(home, "webserver")
        os.kill(webserver, signal.SIGKILL)  # restarted without a message
        wait_until(lambda: is_up() and find_service(home, "webserver") != webserver)
        assert stack.poll() is None
        run("push", *(str(photo) for photo in PHOTOS.glob("*.jpg")))
        for number in range(4):
            run("push", str(PHOTOS / "galaxies.jpg"), "--id", f"galaxy{number}")
        wait_until(lambda: counts()["processing"] or counts()["completed"])
        assert run("down").stdout == "stopped\n"
        assert stack.wait(60) == 0
        wait_until(lambda: not processes_of(home))
        after = counts()
        assert after["processing"] == after["failed"] == 0

        monkeypatch.setenv("IMAGEPIPELINE_KEEP_PARTITIONS", "3")
        stack = start()
        wait_until(lambda: counts()["completed"] == 9)
        assert counts()["failed"] == 0
        retention = Retention(Settings.load().database_url)
        wait_until(lambda: retention.count_in_dagster() == 3)
        assert count_partitions() == [3, 3, 3, 3]
        stop_sensor(webserver_url(), "prune_sensor")  # lest it prune what is restored
        with closing(Catalogue(Settings.load().database_url)) as catalogue:
            rows = catalogue.list_ended("completed")
        restored, pushed, *_ = [row["id"] for row in rows if row["in_dagster"] is None]
        told = run("restore", restored, "--json")
        assert json.loads(told.stdout)[0]["outcome"] == "restored"
        assert count_partitions() == [4, 4, 4, 4]
        run("push", str(PHOTOS / "cat.jpg"), "--id", pushed, "--wait")
        assert counts()["completed"] == 9
        os.kill(stack.pid, signal.SIGKILL)  # the kernel ends all services
        stack.wait()
        if sys.platform == "linux":
            wait_until(lambda: not processes_of(home))
    finally:
        stack.kill()
