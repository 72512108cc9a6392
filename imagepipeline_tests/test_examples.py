"""The examples, run as their headers say, on one stack."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from imagepipeline.settings import Settings
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline_tests.conftest import PHOTOS
from imagepipeline_tests.end_to_end.processes import find_port

EXAMPLES = Path(__file__).parent.parent / "examples"
COMMAND = Path(sys.executable).parent / "imagepipeline"
PATIENCE_SECONDS = 180
CHECKS = """{ assetNodeOrError(assetKey: {path: "metadata"}) { ... on AssetNode {
    assetChecksOrError { ... on AssetChecks { checks { name executionForLatestMaterialization {
        evaluation { success severity metadataEntries { ... on TextMetadataEntry { text } } }
    } } } } } } }"""
pytestmark = pytest.mark.stack


class Stack:
    """A stack with the example's vision server as provider and the example's check."""

    def __init__(self, home, provider_port):
        self.environment = {
            **os.environ,
            "IMAGEPIPELINE_HOME": str(home),
            "IMAGEPIPELINE_WEBSERVER_PORT": str(find_port()),
            "IMAGEPIPELINE_DEFINITIONS": "own_checks",
            "OPENAI_BASE_URL": f"http://127.0.0.1:{provider_port}/v1",
            "PYTHONPATH": str(EXAMPLES),
        }
        # A stack imports nothing from the folder in which it is started.
        folder = Path(home) / "elsewhere"
        folder.mkdir()
        for name in ("imagepipeline", "numpy", "own_checks"):
            (folder / f"{name}.py").write_text("raise RuntimeError('from the current folder')")
        self.process = subprocess.Popen(
            [COMMAND, "up", "--json"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=self.environment,
        )
        addresses = json.loads(self.process.stdout.readline())
        self.redis_socket, self.url = addresses["redis"], addresses["webserver_url"]
        self.storage_root = addresses["storage"]

    def wait_for(self, image_id):
        """The image's row, once its run has ended."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        catalogue = Catalogue(Settings.load(self.environment).database_url)
        while (row := catalogue.get(image_id)) is None or row["status"] not in (
            "completed",
            "failed",
        ):
            assert time.monotonic() < deadline, row
            time.sleep(0.1)
        return row

    def ask(self, query):
        body = json.dumps({"query": query}).encode()
        request = urllib.request.Request(
            f"{self.url}/graphql", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["data"]


@pytest.fixture(scope="module")
def stack():
    port = find_port()
    server = subprocess.Popen([sys.executable, EXAMPLES / "vision_server.py", str(port)])
    try:
        with tempfile.TemporaryDirectory(prefix="ip", dir="/tmp") as home:
            stack = Stack(home, port)
            try:
                yield stack
            finally:
                stack.process.terminate()
                stack.process.communicate()
    finally:
        server.kill()
        server.wait()


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_push_from_python_with_a_provider_and_a_check_of_ones_own(stack):
    image_id = run(
        *(sys.executable, EXAMPLES / "push.py", PHOTOS / "coffee.jpg"),
        *(f"unix://{stack.redis_socket}", stack.storage_root),
    )
    row = stack.wait_for(image_id)
    assert row["status"] == "completed"
    assert row["metadata"]["description"] == "A dark landscape picture of 600 by 400 pixels."
    assert {variant["path"] for variant in row["variants"]} >= {f"variants/{image_id}-sm.webp"}

    [check] = stack.ask(CHECKS)["assetNodeOrError"]["assetChecksOrError"]["checks"]
    assert check["name"] == "has_enough_tags"
    assert check["executionForLatestMaterialization"]["evaluation"] == {
        "success": False,
        "severity": "WARN",
        "metadataEntries": [{"text": "dark, landscape"}],
    }


@pytest.fixture(scope="module")
def node_examples(tmp_path_factory):
    """A copy of the examples, with what they need from npm."""
    folder = tmp_path_factory.mktemp("node") / "examples"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("node_modules"))
    install = ("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder)
    if not shutil.which("npm") or subprocess.run(install, check=False).returncode != 0:
        pytest.skip("npm is not here, or cannot install ioredis")
    return folder


def test_push_from_node(stack, node_examples):
    image_id = run(
        *("node", node_examples / "push.mjs", PHOTOS / "cat.jpg"),
        *(stack.redis_socket, stack.storage_root),
    )
    assert stack.wait_for(image_id)["status"] == "completed"


@pytest.fixture
def page():
    """A page in the system's Chromium; fails if it logs an error."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_SECONDS * 1000)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        yield page
        browser.close()
    assert errors == []


@pytest.fixture(params=["node", "python"])
def gallery_command(request, stack):
    """The command that runs a server of the gallery, with the address of Redis."""
    if request.param == "python":
        return sys.executable, EXAMPLES / "gallery" / "server.py", f"unix://{stack.redis_socket}"
    folder = request.getfixturevalue("node_examples")
    return "node", folder / "gallery" / "server.mjs", stack.redis_socket


@contextmanager
def gallery(stack, command, folder, port):
    """Runs the gallery; yields its address."""
    server = subprocess.Popen(
        [*command, stack.storage_root, str(port)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=stack.environment | {"PATH": f"{COMMAND.parent}:{os.environ['PATH']}"},
    )
    try:
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.communicate()


def test_the_gallery_shows_an_upload_in_a_browser_also_after_a_crash(
    stack, gallery_command, page, tmp_path
):
    port = find_port()
    height = 400 if gallery_command[0] == "node" else 410  # each server gets its own picture
    photo = tmp_path / "rocket.jpg"
    Image.open(PHOTOS / "rocket.jpg").crop((0, 0, 640, height)).save(photo)
    with gallery(stack, gallery_command, tmp_path, port) as address:
        page.goto(address)
        for file in (photo, __file__):
            page.set_input_files("input[type=file]", file)
            page.get_by_role("button", name="Upload").click()
        shown = page.locator("figure", has_text=f"picture of 640 by {height} pixels.")
        shown.wait_for()
        page.locator("figure", has_text="the original is not a picture").first.wait_for()
        picture = shown.locator("img")
        assert picture.evaluate("img => img.decode().then(() => img.naturalWidth)") > 0
        assert picture.evaluate("img => img.currentSrc").endswith(".avif?g=1")
        assert shown.locator("source").get_attribute("srcset").count("640w") == 1
        page.get_by_placeholder("a cup of coffee").fill("a landscape")
        page.get_by_role("button", name="Search").click()
        page.get_by_text("the nearest first").wait_for()
        shown.wait_for()
        page.goto("about:blank")  # it would log that the server is gone
    with gallery(stack, gallery_command, tmp_path, port) as address:
        page.goto(address)
        shown.wait_for()
        page.goto("about:blank")
