"""The production stack: its files are correct, and it works when it runs as they say."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64encode
from contextlib import closing
from pathlib import Path

import boto3
import pytest
import redis
import sqlalchemy as sa
import yaml
from celery import Celery
from PIL import Image

from imagepipeline.models import Status
from imagepipeline.runtime.services import NAMES, SECRETS_OF
from imagepipeline.settings import is_secret
from imagepipeline.stores import broker
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline_tests.conftest import PHOTOS
from imagepipeline_tests.end_to_end.composed import ROOT, Composed
from imagepipeline_tests.end_to_end.processes import list_tree

SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
# All tests share one stack, and run in this order.
pytestmark = pytest.mark.stack
# Set, but not used.
API_KEYS = {
    "OPENAI_API_KEY": "sk-composed-openai",
    "OPENROUTER_API_KEY": "sk-composed-openrouter",
}
ATTACK = (
    'mutation { addDynamicPartition(partitionsDefName: "uploads", partitionKey: "KEY", '
    'repositorySelector: {repositoryName: "__repository__", '
    'repositoryLocationName: "imagepipeline"}) { __typename } }'
)


def test_the_compose_file_is_valid():
    command = [
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        ROOT / "docker-compose.yml",
    ]
    subprocess.run([sys.executable, *command], check=True)


def test_services_have_minimal_privileges():
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"proxy"}
    for name, service in SERVICES.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["deploy"]["resources"]["limits"]["memory"], name
        assert name == "migrate" or service["healthcheck"]["test"], name
        assert name == "proxy" or "root" not in service["user"], name
        for key in service.get("environment", {}):  # secrets come from files
            assert not re.search("PASSWORD|KEY|SECRET|_URL", key) or key.endswith("_FILE"), key
    assert SERVICES["daemon"]["deploy"]["replicas"] == 1
    # There may be several workers.
    assert not {"container_name", "hostname", "ports"} & SERVICES["worker"].keys()
    assert not any(volume.startswith("sockets:") for volume in SERVICES["worker"]["volumes"])


def test_each_service_is_given_the_secrets_it_needs_and_no_more():
    variables = {name: set(service.get("environment", {})) for name, service in SERVICES.items()}
    for name in ("code-server", "worker", "daemon", "webserver"):
        given = {
            variable.removesuffix("_FILE") for variable in variables[name] if is_secret(variable)
        }
        assert given <= SECRETS_OF[name] | {
            "DAGSTER_DATABASE_URL",
            "IMAGEPIPELINE_BROKER_URL",
        }, name
        assert len(given) == len(SERVICES[name]["secrets"]), name
    assert not {"OPENAI_API_KEY_FILE", "OPENROUTER_API_KEY_FILE"} & variables["migrate"]


def test_secrets_of_an_earlier_version_are_updated(tmp_path):
    def make():
        command = [sys.executable, ROOT / "deploy" / "make-secrets.py", tmp_path]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    make()
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    for name in ("redis_dagster_url", "redis_dagster_password"):
        (tmp_path / name).unlink()
    users = kept["redis_users.acl"].splitlines(keepends=True)
    (tmp_path / "redis_users.acl").write_text(
        "".join(user for user in users if "user dagster" not in user)
    )
    (tmp_path / "openai_api_key").write_text("sk-earlier\n")
    said = make()
    assert "redis_users.acl, which redis reads when it starts" in said
    assert (
        "openai_api_key holds a key, which is used only with IMAGEPIPELINE_VISION=remote in .env"
        in said
    )
    assert "openrouter" not in said
    assert "sk-earlier" not in said
    now = {path.name: path.read_text() for path in tmp_path.iterdir()}
    changed = {name for name in kept if now[name] != kept[name]}
    assert changed == {
        "redis_dagster_url",
        "redis_dagster_password",
        "redis_users.acl",
        "openai_api_key",
    }
    assert "user dagster" in now["redis_users.acl"]


@pytest.fixture(scope="module")
def stack(postgres_url, s3_server):
    with tempfile.TemporaryDirectory(prefix="ip", dir="/tmp") as folder:
        settings = {"IMAGEPIPELINE_STORAGE_ROOT": "s3://images/composed", **s3_server}
        keys = {
            name: settings.pop(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        } | API_KEYS
        stack = Composed(Path(folder), postgres_url, settings, "max_runs = 4")
        for name, key in keys.items():
            secret = stack.folder / "secrets" / name.lower()
            secret.chmod(0o600)
            secret.write_text(key)
        try:
            stack.start()
            yield stack
        finally:
            codes = stack.stop()
            assert set(codes.values()) == {0}, codes


@pytest.fixture
def bucket(s3_server):
    keys = {
        name: s3_server[name.upper()] for name in ("aws_access_key_id", "aws_secret_access_key")
    }
    return boto3.client(
        "s3", endpoint_url=s3_server["AWS_ENDPOINT_URL"], region_name="us-east-1", **keys
    )


def push(stack, bucket, name, photo):
    """Uploads an original to the bucket and pushes its ID to the list."""
    bucket.put_object(Bucket="images", Key=f"composed/original/{name}.jpg", Body=photo.read_bytes())
    redis.Redis.from_url(stack.read_secret("redis_uploader_url")).lpush(
        "image-processing:wait", name
    )


def wait_for(stack, **counts):
    """Waits until the numbers of images are these, as `imagepipeline status` shows them."""
    deadline = time.monotonic() + 150
    with (
        closing(Catalogue(stack.read_secret("catalogue_database_url"))) as catalogue,
        closing(UploadQueue(stack.read_secret("redis_pipeline_url"))) as queue,
    ):
        while not counts.items() <= (found := queue.count() | catalogue.count()).items():
            assert time.monotonic() < deadline, (found, stack.read_log("worker")[-3000:])
            time.sleep(0.1)


def list_runs(stack, status):
    """Returns the IDs of runs with a status, from the UI's API."""
    query = (
        f"{{ runsOrError(filter: {{statuses: [{status}]}}) "
        "{ ... on Runs { results { runId } } } }"
    )
    user = ("admin", stack.read_secret("ui_password"))
    answer = json.loads(ask(stack.site + "/graphql", query, user, Origin=stack.site)[1])
    return [run["runId"] for run in answer["data"]["runsOrError"]["results"]]


def ask(url, query=None, user=None, **headers):
    """Returns the status and body of an answer; a query is posted as JSON, like the UI's."""
    if user:
        headers["Authorization"] = "Basic " + b64encode(":".join(user).encode()).decode()
    body = (
        None
        if query is None
        else (query if isinstance(query, bytes) else json.dumps({"query": query}).encode())
    )
    if isinstance(query, str):
        headers.setdefault("Content-Type", "application/json")
    request = urllib.request.Request(
        url, body, {name.replace("_", "-"): value for name, value in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_photos_are_processed_even_if_worker_and_code_server_are_killed(
    stack, bucket, postgres_url, tmp_path
):
    photos = sorted(PHOTOS.glob("*.jpg"))
    for photo in photos:
        push(stack, bucket, f"first-{photo.stem}", photo)
    wait_for(stack, completed=5)
    keys = {
        entry["Key"]
        for entry in bucket.list_objects_v2(Bucket="images", Prefix="composed/variants")["Contents"]
    }
    assert len(keys) == 12  # of originals up to 1000 px wide
    assert "composed/variants/first-cat-sm.avif" in keys
    found = json.loads(
        stack.call("worker", ["imagepipeline", "search", "a cup of coffee", "--json"])
    )
    assert found[0]["image_id"] == "first-coffee"

    for photo in photos:  # other bytes, as the same ones would be reused
        other = tmp_path / photo.name
        Image.open(photo).save(other, quality=90)
        push(stack, bucket, f"second-{photo.stem}", other)
    while list_runs(stack, "STARTED") == []:
        time.sleep(0.02)
    for name in ("worker", "code-server"):
        os.killpg(stack.running[name].pid, signal.SIGKILL)
        stack.running[name].wait()
    for name in ("code-server", "worker"):
        stack.start_service(name)
    wait_for(stack, completed=10, failed=0, processing=0, pending=0)

    with sa.create_engine(postgres_url).connect() as connection:
        query = (
            "SELECT usename, datname, count(*) FROM pg_stat_activity "
            "WHERE usename <> 'postgres' GROUP BY 1, 2"
        )
        used = connection.exec_driver_sql(query).all()
        limits = dict(
            connection.exec_driver_sql("SELECT rolname, rolconnlimit FROM pg_roles").all()
        )
    assert {(user, database) for user, database, _ in used} <= {
        ("catalogue", "catalogue"),
        ("dagster", "dagster"),
    }
    assert all(count <= limits[user] / 2 for user, _, count in used), used


def test_all_services_know_what_the_settings_file_says(stack):
    for name in NAMES:
        config = yaml.safe_load((stack.folder / name / "dagster" / "dagster.yaml").read_text())
        assert config["concurrency"]["runs"]["max_concurrent_runs"] == 4


def test_a_run_cancelled_in_the_ui_is_cancelled(stack):
    uploader = redis.Redis.from_url(stack.read_secret("redis_uploader_url"))
    # It has no original, so its run waits for one for some seconds.
    uploader.lpush("image-processing:wait", "awaited")
    while not (runs := list_runs(stack, "STARTED")):
        time.sleep(0.02)
    cancel = f'mutation {{ terminateRun(runId: "{runs[0]}") {{ __typename }} }}'
    user = ("admin", stack.read_secret("ui_password"))
    assert "TerminateRunSuccess" in ask(stack.site + "/graphql", cancel, user, Origin=stack.site)[1]
    wait_for(stack, failed=1, processing=0, pending=0)
    while list_runs(stack, "CANCELING"):  # the image has ended, and its run is about to
        time.sleep(0.02)
    assert list_runs(stack, "CANCELED") == runs
    awaited = json.loads(stack.call("worker", ["imagepipeline", "status", "awaited", "--json"]))
    assert awaited["reason"] == "cancelled"


def test_a_worker_may_put_the_task_of_a_dead_worker_back_on_the_list(stack):
    config = broker.build_config("image-processing")
    with Celery(
        broker=stack.read_secret("redis_pipeline_url"), config_source=config
    ).connection() as connection:
        queue = connection.SimpleQueue("taken")
        queue.put({"run": 1})
        taken = queue.get(timeout=10)
        with pytest.raises(queue.Empty):
            queue.get(block=False)
        queue.channel.qos.restore_by_tag(taken.delivery_tag)
        again = queue.get(timeout=10)
        assert again.payload == taken.payload
        again.ack()
        queue.queue.delete()
        queue.close()


def test_no_service_lacks_a_permission_in_redis(stack):
    admin = redis.Redis(
        port=stack.ports["redis"],
        username="admin",
        password=stack.read_secret("redis_admin_password"),
    )
    assert [(entry["username"], entry["object"]) for entry in admin.acl_log()] == []


def test_only_workers_have_keys_in_their_environment(stack, s3_server):
    environments = {}
    for name in ("code-server", "worker", "daemon", "webserver"):
        for pid in list_tree(stack.running[name].pid):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            owner = next(
                (module for module in (b".zygote", b".resident") if module in command),
                name.encode(),
            ).decode()
            environments.setdefault(owner, []).append(Path(f"/proc/{pid}/environ").read_bytes())
    assert len(environments["worker"]) > 1
    assert environments.keys() == {
        "code-server",
        "worker",
        ".resident",
        ".zygote",
        "daemon",
        "webserver",
    }

    def find_holders(secret):
        return {
            name
            for name, held in environments.items()
            if any(secret.encode() in each for each in held)
        }

    assert [find_holders(key) for key in API_KEYS.values()] == [{"worker"}, {"worker"}]
    assert find_holders(s3_server["AWS_SECRET_ACCESS_KEY"]) == {"worker", ".resident"}
    for secret in ("redis_pipeline_password", "catalogue_database_password"):
        assert find_holders(stack.read_secret(secret)) == {"worker", "code-server"}, secret
    assert find_holders(stack.read_secret("redis_dagster_password")) == {"daemon", "webserver"}
    assert find_holders(stack.read_secret("dagster_database_password")) == {
        *("worker", "code-server", "daemon", "webserver")
    }


def test_each_redis_user_can_do_its_work_and_no_more(stack):
    uploader, reader, pipeline, dagster = (
        redis.Redis.from_url(stack.read_secret(f"redis_{name}_url"))
        for name in ("uploader", "reader", "pipeline", "dagster")
    )
    assert uploader.llen("image-processing:wait") == 0
    for refused in (
        lambda: uploader.lrange("image-processing:wait", 0, -1),
        lambda: uploader.lpush("image-processing:dead", "x"),
        lambda: uploader.get("image-processing:limit"),
        lambda: uploader.lpush("image-processing:runs:dagster", "x"),
        lambda: uploader.publish("image-processing:runs:/0.celery.pidbox", "x"),
        lambda: reader.lpush("image-processing:wait", "x"),
        lambda: reader.xadd("image-processing:events", {"event": "{}"}),
        lambda: reader.xtrim("image-processing:events", 0),
        lambda: reader.delete("image-processing:events"),
        lambda: reader.xgroup_destroy("image-processing:events", "app"),
        lambda: dagster.lpush("image-processing:wait", "x"),
        lambda: dagster.get("image-processing:limit"),
        lambda: dagster.publish("other", "x"),
        lambda: dagster.set("image-processing:runs:x", "x"),
        lambda: dagster.delete("image-processing:runs:dagster"),
        lambda: dagster.eval("return 1", 0),
        lambda: dagster.keys(),
        lambda: pipeline.set("other", "x"),
        lambda: pipeline.publish("other", "x"),
        lambda: pipeline.flushall(),
        lambda: pipeline.config_set("maxmemory-policy", "allkeys-lru"),
        lambda: pipeline.eval("return 1", 0),
        lambda: pipeline.keys(),
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            refused()
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=stack.ports["redis"]).ping()
    stack.call("worker", ["imagepipeline", "limit", "100/minute"])


def test_apps_consume_events_and_read_two_views_and_nothing_else(stack):
    events = redis.Redis.from_url(stack.read_secret("redis_reader_url"))
    events.xgroup_create("image-processing:events", "app", id="0")
    [[_, entries]] = events.xreadgroup("app", "one", {"image-processing:events": ">"})
    told = [json.loads(fields[b"event"]) for _, fields in entries]
    last = {one["imageId"]: one for one in told if one["type"] == "image.completed"}
    completed = last.keys()
    assert len(completed) == 10
    assert events.xack("image-processing:events", "app", *(number for number, _ in entries))

    url = stack.read_secret("reader_database_url").replace("postgresql", "postgresql+psycopg2")
    with sa.create_engine(url).connect() as connection:
        query = "SELECT id FROM published_images_v1 WHERE status = 'completed'"
        assert set(connection.exec_driver_sql(query).scalars()) == completed
        query = "SELECT count(*) FROM published_variants_v1"
        files = sum(len(one["variants"]) for one in last.values())
        assert connection.exec_driver_sql(query).scalar_one() == files >= 20
        connection.rollback()
        for refused in (
            "SELECT * FROM images",
            "SELECT * FROM events",
            "CREATE TABLE mine (id int)",
            "SET TRANSACTION READ WRITE; DELETE FROM images",
        ):
            with pytest.raises(sa.exc.DBAPIError, match=r"permission denied|read-only"):
                connection.exec_driver_sql(refused)
            connection.rollback()


def test_a_foreign_page_cannot_change_anything_through_the_proxy(stack):
    bare, site = f"http://127.0.0.1:{stack.ports['webserver']}", stack.site
    user = ("admin", stack.read_secret("ui_password"))
    by_get = "/graphql?" + urllib.parse.urlencode({"query": ATTACK.replace("KEY", "by-get")})
    foreign = {"Origin": "https://evil.example", "Host": "evil.example"}
    as_text = "/graphql?" + urllib.parse.urlencode({"query": ATTACK.replace("KEY", "as-text")})
    as_json = json.dumps({"query": ATTACK.replace("KEY", "as-json")}).encode()
    # Browsers send this type without a preflight request.
    simple_json = "text/plain; application/json"
    # The webserver itself refuses it, too.
    assert ask(bare + by_get, **foreign)[0] == 421
    assert ask(bare + as_text, b"", Content_Type="text/plain", **foreign)[0] == 421
    assert ask(bare + "/graphql", as_json, Content_Type=simple_json, **foreign)[0] == 421
    assert ask(bare + by_get)[0] == 405

    assert ask(site + "/") == (401, "")
    assert ask(site + "/", user=("admin", "admin"))[0] == 401
    again = "/graphql?" + urllib.parse.urlencode({"query": ATTACK.replace("KEY", "again")})
    text = as_json.replace(b"as-json", b"again")
    refused = [
        ask(site + again, user=user),
        ask(site + again, user=user, Origin="https://evil.example"),
        ask(site + again, user=user, Upgrade="websocket", Connection="Upgrade"),
        ask(site + again.replace("graphql", "%67raphql"), user=user),
        ask(site + "/" + again, user=user),
        ask(site + again, b"", user, Content_Type="text/plain"),
        ask(site + "/graphql", text, user, Content_Type=simple_json),
        ask(site + "/graphql", text, user, Content_Type="application/x-www-form-urlencoded"),
        ask(
            site + "/graphql",
            text,
            user,
            Content_Type="application/json",
            Origin="https://evil.example",
        ),
        ask(site + "/graphql", text, user, Content_Type="application/json", Origin="null"),
        ask(
            site + "/report_asset_materialization/metadata",
            b"",
            user,
            Origin="https://evil.example",
        ),
    ]
    assert [status for status, _ in refused] == [
        405,
        403,
        405,
        405,
        405,
        405,
        405,
        405,
        403,
        403,
        403,
    ]
    assert ask(
        site + "/graphql", text, user, Content_Type="application/json", Host="evil.example"
    ) == (200, "")
    query = (
        '{ assetNodeOrError(assetKey: {path: ["metadata"]}) '
        "{ ... on AssetNode { partitionKeys } } }"
    )
    # The UI itself may make the change.
    assert (
        "AddDynamicPartitionSuccess"
        in ask(site + "/graphql", ATTACK.replace("KEY", "own"), user, Origin=site)[1]
    )
    status, body = ask(site + "/graphql", query, user, Origin=site)
    keys = set(json.loads(body)["data"]["assetNodeOrError"]["partitionKeys"])
    assert (status, keys & {"own", "by-get", "as-text", "as-json", "again"}) == (200, {"own"})


@pytest.mark.parametrize(
    ("origin", "status"), [(None, 101), ("https://evil.example", 403), ("", 405)]
)
def test_only_the_ui_itself_may_open_a_websocket(stack, origin, status):
    connection = http.client.HTTPConnection("127.0.0.1", stack.ports["proxy"], timeout=30)
    user = b64encode(f"admin:{stack.read_secret('ui_password')}".encode()).decode()
    headers = {
        "Authorization": f"Basic {user}",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": b64encode(os.urandom(16)).decode(),
        "Sec-WebSocket-Protocol": "graphql-ws",
    }
    if origin != "":
        headers["Origin"] = origin or stack.site
    connection.request("GET", "/graphql", headers=headers)
    assert connection.getresponse().status == status
    connection.close()


def test_a_second_daemon_is_refused(stack):
    command = SERVICES["daemon"]["command"]
    second = subprocess.run(
        command,
        env=stack.build_environment("daemon"),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert second.returncode == 1
    assert "Another daemon already uses this database" in second.stderr
    assert stack.running["daemon"].poll() is None


def test_secrets_are_neither_logged_nor_shown(stack):
    user = ("admin", stack.read_secret("ui_password"))
    query = (
        "{ runsOrError { ... on Runs { results { runId runConfigYaml tags { key value } } } } "
        "instance { info } }"
    )
    shown = ask(stack.site + "/graphql", query, user, Origin=stack.site)[1]
    shown += "".join(log.read_text(errors="replace") for log in stack.folder.glob("*.log"))
    assert "composed" in shown or "imagepipeline" in shown
    for secret in (stack.folder / "secrets").glob("*password"):
        assert secret.read_text().strip() not in shown, secret.name


def test_the_error_for_a_missing_secret_names_it(stack):
    environment = stack.build_environment("daemon") | {"DAGSTER_DATABASE_URL_FILE": "/nowhere/url"}
    result = subprocess.run(
        SERVICES["daemon"]["command"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 3
    assert "DAGSTER_DATABASE_URL_FILE names /nowhere/url, which cannot be read" in result.stderr


def test_a_backup_made_by_the_operations_page_restores_everything(stack, bucket, tmp_path):
    def list_keys():
        pages = bucket.get_paginator("list_objects_v2").paginate(
            Bucket="images", Prefix="composed/"
        )
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def count():
        counts = json.loads(stack.call("worker", ["imagepipeline", "status", "--json"]))
        return {name: counts[name] for name in ("waiting", *Status, "dead")}

    push(stack, bucket, "kept", PHOTOS / "cat.jpg")
    wait_for(stack, waiting=0, pending=0, processing=0)
    stack.stop_service("daemon")
    before = count()
    for name in ("catalogue", "dagster"):
        dump = [
            "pg_dump",
            "--username=postgres",
            "--format=custom",
            f"--file={tmp_path / name}",
            name,
        ]
        stack.call("postgres", dump)
    # The worst case: more runs end, unnoticed, before files and index are copied.
    stack.start_service("daemon")
    for generation in (2, 3):
        push(stack, bucket, "kept", PHOTOS / "coffee.jpg")
        wait_for(stack, waiting=0, pending=0, processing=0)
        kept = json.loads(stack.call("worker", ["imagepipeline", "status", "kept", "--json"]))
        assert kept["generation"] == generation
    stack.stop_service("daemon")
    objects = {
        key: bucket.get_object(Bucket="images", Key=key)["Body"].read() for key in list_keys()
    }

    for name in ("webserver", "worker", "code-server"):
        stack.stop_service(name)
    psql = ["psql", "--username=postgres", "--set=ON_ERROR_STOP=1"]
    for name in ("catalogue", "dagster"):
        stack.call("postgres", [*psql, "--command", f"DROP DATABASE {name} WITH (FORCE)"])
    for key in objects:
        bucket.delete_object(Bucket="images", Key=key)
    assert not list_keys()

    for name in ("catalogue", "dagster"):
        stack.call("postgres", [*psql, "--command", f"CREATE DATABASE {name} OWNER {name}"])
        stack.call("postgres", [*psql, "--command", f"REVOKE ALL ON DATABASE {name} FROM PUBLIC"])
        stack.call(
            "postgres",
            ["pg_restore", "--username=postgres", f"--dbname={name}", str(tmp_path / name)],
        )
    for key, body in objects.items():
        bucket.put_object(Bucket="images", Key=key, Body=body)
    stack.call(
        "postgres",
        [*psql, "--dbname=catalogue", "--command", "UPDATE images SET fence = fence + 1000000"],
    )
    stack.call("migrate", SERVICES["migrate"]["command"])
    for name in ("code-server", "worker", "daemon", "webserver"):
        stack.start_service(name)

    assert count() == before
    assert json.loads(stack.call("worker", ["imagepipeline", "search", "a cat", "--json"]))
    command = ["imagepipeline", "doctor", "--json"]
    asked = subprocess.run(
        command, env=stack.build_environment("worker"), capture_output=True, text=True, check=False
    )
    findings = [json.loads(line) for line in asked.stdout.splitlines()]
    unwell = {finding["name"] for finding in findings if not finding["is_well"]}
    assert unwell <= {"code server"}, asked.stdout  # which the worker cannot reach
    push(stack, bucket, "kept", PHOTOS / "cat.jpg")
    push(stack, bucket, "new", PHOTOS / "rocket.jpg")
    wait_for(
        stack,
        completed=before["completed"] + 1,
        failed=before["failed"],
        waiting=0,
        pending=0,
        processing=0,
    )
    kept = json.loads(stack.call("worker", ["imagepipeline", "status", "kept", "--json"]))
    assert [event["event"] for event in kept["history"]].count("recovered") == 0
