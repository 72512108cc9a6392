"""The manifests for Kubernetes are valid, and give each service what it needs but no more."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import boto3
import kubernetes_validate
import pytest
import redis
import yaml
from click.testing import CliRunner

from imagepipeline import cli
from imagepipeline.runtime.services import INSTANCE_SECRETS, NAMES, SECRETS_OF
from imagepipeline.settings import BUCKET_SECRETS, Settings, is_secret
from imagepipeline.stores.broker import QUEUE
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline_tests.conftest import PHOTOS, postgres_database, redis_server
from imagepipeline_tests.end_to_end.composed import ROOT
from imagepipeline_tests.end_to_end.processes import find_port

pytestmark = pytest.mark.stack

FOLDER = ROOT / "deploy" / "kubernetes"
CLOUD_SETTINGS = {"AWS_REGION", "AWS_ENDPOINT_URL"}  # read by the libraries of the cloud
OF_KEDA = "keda.sh/v1alpha1"


def read(name):
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


MANIFESTS = {
    f"{path.name}-{number}": manifest
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for number, manifest in enumerate(read(path.name))
}
PODS = {
    name: manifest["spec"]["template"]["spec"]
    for name, manifest in MANIFESTS.items()
    if manifest["kind"] in ("Deployment", "Job")
}
CONTAINERS = {
    container["name"]: container for pod in PODS.values() for container in pod["containers"]
}
SETTINGS, FILE = read("settings.yaml")[0]["data"], read("settings.yaml")[1]
SECRET = read("secret.example.yaml")[0]["stringData"]


def find_secrets(container):
    return {entry["name"] for entry in container["env"] if "valueFrom" in entry}


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
@pytest.mark.parametrize(
    "name", [name for name, manifest in MANIFESTS.items() if manifest["apiVersion"] != OF_KEDA]
)
def test_a_manifest_is_valid(name, version):
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def test_an_unknown_field_is_detected():
    manifest = MANIFESTS["worker.yaml-0"] | {"specification": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_the_kustomization_lists_all_manifests_except_examples():
    resources = read("kustomization.yaml")[0]["resources"]
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert {*resources} == {name for name in files if not name.endswith(".example.yaml")}
    images = {image["name"] for image in read("kustomization.yaml")[0]["images"]}
    assert {container["image"] for container in CONTAINERS.values()} == images


def test_variables_in_manifests_are_settings():
    known = {field.alias for field in Settings.model_fields.values()} | CLOUD_SETTINGS
    assert SETTINGS.keys() <= known
    assert not any(is_secret(name) for name in SETTINGS)
    assert SECRET.keys() <= known | BUCKET_SECRETS
    assert all(is_secret(name) and value == "" for name, value in SECRET.items())
    Settings.load(SETTINGS | {"IMAGEPIPELINE_CONFIG": os.devnull})
    for container in CONTAINERS.values():
        told = {entry["name"] for entry in container["env"]} - find_secrets(container)
        assert told <= known
        assert not any(is_secret(name) for name in told)
        assert container["envFrom"] == [{"configMapRef": {"name": "imagepipeline"}}]


def test_each_service_is_given_the_secrets_it_needs_and_no_more():
    assert CONTAINERS.keys() == {*NAMES, "migrate"}
    for name in NAMES:
        given = find_secrets(CONTAINERS[name])
        assert given <= SECRETS_OF[name] | INSTANCE_SECRETS, name
        assert given >= (SECRETS_OF[name] - INSTANCE_SECRETS) & SECRET.keys(), name
        assert "DAGSTER_DATABASE_URL" in given, name
    assert find_secrets(CONTAINERS["migrate"]) == {"DATABASE_URL", "DAGSTER_DATABASE_URL"}
    for container in CONTAINERS.values():
        for entry in container["env"]:
            if "valueFrom" in entry:
                reference = entry["valueFrom"]["secretKeyRef"]
                assert (reference["name"], reference["key"]) == ("imagepipeline", entry["name"])
                assert entry["name"] in SECRET


def test_pods_have_minimal_privileges():
    for name, pod in PODS.items():
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["runAsUser"] == 10001, name  # as in the Dockerfile
        assert not pod["automountServiceAccountToken"], name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        [file] = [one["configMap"]["name"] for one in pod["volumes"] if "emptyDir" not in one]
        assert file == FILE["metadata"]["name"], name
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert SETTINGS["IMAGEPIPELINE_CONFIG"] in mounts
            assert any(Path(SETTINGS["IMAGEPIPELINE_HOME"]).is_relative_to(path) for path in mounts)
            # A volume's folder belongs to root, so each user creates its home in it.
            assert SETTINGS["IMAGEPIPELINE_HOME"] not in mounts
    open_ports = {name for name, container in CONTAINERS.items() if "ports" in container}
    assert open_ports == {"webserver"}
    policies = {
        manifest["metadata"]["name"]: manifest["spec"] for manifest in read("network.yaml")[1:]
    }
    assert "ingress" not in policies["imagepipeline-closed"]
    labels = policies["imagepipeline-closed"]["podSelector"]["matchLabels"].items()
    for manifest in MANIFESTS.values():
        if manifest["kind"] in ("Deployment", "Job"):
            assert labels <= manifest["spec"]["template"]["metadata"]["labels"].items()


def test_commands_and_probes_exist_in_our_command_line():
    for name, container in CONTAINERS.items():
        commands = [container["command"]]
        commands += [
            probe["exec"]["command"]
            for key, probe in container.items()
            if "Probe" in key and "exec" in probe
        ]
        for command in commands:
            assert command[0] == "imagepipeline"
            assert CliRunner().invoke(cli.cli, [*command[1:], "--help"]).exit_code == 0
            assert (
                command[1:3] == ["migrate"]
                if name == "migrate"
                else command[1:3] == ["service", name]
            )
        assert (
            name in ("migrate", "webserver")
            or container["livenessProbe"]["exec"]["command"][-1] == "--check"
        )
    assert PODS["worker.yaml-0"]["terminationGracePeriodSeconds"] >= 200
    assert (
        MANIFESTS["pipeline.yaml-0"]["spec"] | {"replicas": 1, "strategy": {"type": "Recreate"}}
        == (MANIFESTS["pipeline.yaml-0"]["spec"])
    )


def test_the_autoscaler_counts_the_runs_that_wait_for_a_worker():
    scaled, authentication = read("autoscaling.example.yaml")
    assert (scaled["apiVersion"], authentication["apiVersion"]) == (OF_KEDA, OF_KEDA)
    assert (scaled["kind"], authentication["kind"]) == ("ScaledObject", "TriggerAuthentication")
    spec = scaled["spec"]
    assert spec["scaleTargetRef"]["name"] == MANIFESTS["worker.yaml-0"]["metadata"]["name"]
    (trigger,) = spec["triggers"]
    assert trigger["type"] == "redis"
    assert trigger["metadata"]["listName"] == f"{Settings.load({}).queue_prefix}:runs:{QUEUE}"
    assert all(isinstance(value, str) for value in trigger["metadata"].values())  # needed by KEDA
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
    slots = int(SETTINGS["IMAGEPIPELINE_WORKER_SLOTS"])
    text = (FOLDER / "autoscaling.example.yaml").read_text()
    assert int(re.search(r"here (\d+)", text)[1]) == spec["maxReplicaCount"] * slots
    assert trigger["metadata"]["listLength"] == str(slots)
    replicas = MANIFESTS["worker.yaml-0"]["spec"]["replicas"]
    assert int(SETTINGS["IMAGEPIPELINE_MAX_RUNS"]) == replicas * slots


class Pods:
    """Runs the containers as plain processes with the environments of their manifests.

    Containers of one pod share a home.
    """

    def __init__(self, folder, secret, settings):
        self.folder, self.secret, self.settings = folder, secret, settings
        self.running = {}

    def build_environment(self, name):
        (pod,) = (
            key
            for key, pod in PODS.items()
            if name in [container["name"] for container in pod["containers"]]
        )
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **self.settings,
        }
        environment["IMAGEPIPELINE_HOME"] = str(self.folder / pod.partition(".")[0])
        file = self.folder / "imagepipeline.toml"
        file.write_text(FILE["data"][file.name])
        environment["IMAGEPIPELINE_CONFIG"] = str(file)
        for entry in CONTAINERS[name]["env"]:
            if "value" in entry:
                environment.setdefault(entry["name"], entry["value"])
            elif entry["name"] in self.secret:
                environment[entry["name"]] = self.secret[entry["name"]]
        return environment

    def call(self, name, command):
        return subprocess.run(
            command, env=self.build_environment(name), capture_output=True, text=True, check=False
        )

    def start(self, *names):
        for name in names:
            log = (self.folder / f"{name}.log").open("ab")
            environment = self.build_environment(name)
            self.running[name] = subprocess.Popen(
                CONTAINERS[name]["command"],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self):
        for process in self.running.values():
            process.terminate()
        try:
            return {name: process.wait(60) for name, process in self.running.items()}
        finally:
            for process in self.running.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def pods(postgres_url, s3_server):
    """Starts databases and Redis, but no container."""
    with (
        tempfile.TemporaryDirectory(prefix="ip", dir="/tmp") as folder,
        postgres_database(postgres_url) as catalogue_url,
        postgres_database(postgres_url) as dagster_url,
        redis_server() as redis_url,
    ):
        secret = {name: key for name, key in s3_server.items() if is_secret(name)}
        secret |= {
            "DATABASE_URL": catalogue_url,
            "DAGSTER_DATABASE_URL": dagster_url,
            "REDIS_URL": redis_url,
        }
        secret["IMAGEPIPELINE_BROKER_URL"] = redis_url
        settings = SETTINGS | {
            name: value for name, value in s3_server.items() if not is_secret(name)
        }
        settings["IMAGEPIPELINE_STORAGE_ROOT"] = "s3://images/pods"
        settings |= {
            "IMAGEPIPELINE_WEBSERVER_PORT": str(find_port()),
            "IMAGEPIPELINE_WEBSERVER_HOST": "127.0.0.1",
        }
        started = Pods(Path(folder), secret, settings)
        try:
            yield started
        finally:
            codes = started.stop()
            assert set(codes.values()) == {0}, codes


def test_a_pod_and_a_worker_process_an_image(postgres_url, s3_server):
    with pods(postgres_url, s3_server) as stack:
        migrated = stack.call("migrate", CONTAINERS["migrate"]["command"])
        assert migrated.returncode == 0, migrated.stderr
        stack.start("code-server", "daemon", "webserver", "worker")  # at the same time, as in a pod
        keys = {
            name: s3_server[name.upper()] for name in ("aws_access_key_id", "aws_secret_access_key")
        }
        bucket = boto3.client(
            "s3", endpoint_url=s3_server["AWS_ENDPOINT_URL"], region_name="us-east-1", **keys
        )
        bucket.put_object(
            Bucket="images", Key="pods/original/cat.jpg", Body=(PHOTOS / "cat.jpg").read_bytes()
        )
        redis.Redis.from_url(stack.secret["REDIS_URL"]).lpush("image-processing:wait", "cat")
        deadline = time.monotonic() + 120
        catalogue = Catalogue(stack.secret["DATABASE_URL"])
        while catalogue.count()["completed"] != 1:
            assert {
                name: process.poll()
                for name, process in stack.running.items()
                if process.poll() is not None
            } == {}
            assert time.monotonic() < deadline, catalogue.count()
            time.sleep(0.1)
        catalogue.close()
        found = bucket.list_objects_v2(Bucket="images", Prefix="pods/")["Contents"]
        folders = {entry["Key"].split("/")[1] for entry in found}
        assert folders == {"original", "variants", "lancedb"}
        for name in stack.running:
            asked = stack.call(name, ["imagepipeline", "service", name, "--check"])
            assert asked.returncode == 0, (name, asked.stderr)
