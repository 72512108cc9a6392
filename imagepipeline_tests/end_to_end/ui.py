"""A stack with uploads, nine of them bad, and its UI in a browser, with clicks counted."""

import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from PIL import Image, ImageEnhance
from playwright.sync_api import Locator, Page, expect, sync_playwright

from imagepipeline.stores.catalogue import Catalogue
from imagepipeline_tests.conftest import PHOTOS
from imagepipeline_tests.end_to_end.processes import find_port

COMMAND = Path(sys.executable).parent / "imagepipeline"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
GOOD, BAD = 11, 9
PATIENCE_SECONDS = 600
WINDOW = {"width": 1440, "height": 900}
ASSETS = ("queue", "original", "metadata", "variants", "embedding", "index", "outdated")


def find_browser() -> str | None:
    """Returns the path of an installed Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def make_uploads(good: int = GOOD) -> dict[str, bytes]:
    """Returns the files of uploads by file name; those of `bad-…` will be rejected."""
    photos = sorted(PHOTOS.glob("*.jpg"))
    uploads = {}
    for number in range(good):
        image = Image.open(photos[number % len(photos)])
        image.thumbnail((400, 400))
        changed = ImageEnhance.Brightness(image).enhance(0.8 + number / 100)
        uploads[f"photo-{number:02}.jpg"] = _encode(changed)
    whole = uploads["photo-00.jpg"]
    bad = {
        "cut": whole[: len(whole) // 2],
        "damaged": whole[:300] + bytes(range(256)) * 8 + whole[-300:],
        "document": b"%PDF-1.7\n" + bytes(500),
        "drawing": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "empty": b"",
        "gif": b"GIF89a" + bytes(range(40)),
        "huge": _encode(Image.new("1", (9000, 9000)), "PNG"),
        "png": b"\x89PNG\r\n\x1a\n" + bytes(range(200)),
        "text": b"This is no picture. " * 20,
    }
    assert len(bad) == BAD
    return uploads | {f"bad-{name}.jpg": content for name, content in bad.items()}


def _encode(image: Image.Image, format_: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_)
    return buffer.getvalue()


class Stack:
    """A local stack in a home of its own.

    Args:
        home: a short path, because of its sockets.
        port: of the UI.
    """

    def __init__(self, home: Path, port: int) -> None:
        self.home = home
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {
            **os.environ,
            "IMAGEPIPELINE_HOME": str(home),
            "IMAGEPIPELINE_WEBSERVER_PORT": str(port),
        }

    def push(self, name: str, content: bytes) -> None:
        """Stores an original and pushes its ID."""
        original = self.home / "storage" / "original" / name
        original.parent.mkdir(parents=True, exist_ok=True)
        original.write_bytes(content)
        self.push_id(original.stem)

    def push_id(self, image_id: str) -> None:
        """Pushes an ID."""
        import redis

        redis.Redis(unix_socket_path=str(self.home / "sockets" / "valkey.sock")).lpush(
            "image-processing:wait", image_id
        )

    def wait_for(self, **counts: int) -> None:
        """Waits until so many images have these statuses."""
        with closing(Catalogue(f"sqlite:///{self.home / 'catalogue.sqlite'}")) as catalogue:
            wait_until(lambda: counts.items() <= catalogue.count().items())


def wait_until(is_true: Callable[[], bool]) -> None:
    """Waits until a condition is met."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_true():
        assert time.monotonic() < deadline, "this takes too long"
        time.sleep(0.5)


@contextmanager
def running_stack() -> Iterator[Stack]:
    """Starts a stack and stops it afterwards."""
    with tempfile.TemporaryDirectory(prefix="ip", dir="/tmp") as folder:
        stack = Stack(Path(folder, "home"), find_port())
        with subprocess.Popen(
            [COMMAND, "up", "--json"], env=stack.environment, stdout=subprocess.PIPE
        ) as process:
            try:
                assert process.stdout
                assert process.stdout.readline()
                yield stack
            finally:
                process.terminate()
                process.wait(60)


class Ui:
    """The UI in a browser.

    Args:
        page: of the browser.
        url: of the UI.
        folder: where screenshots go; None for none.
    """

    def __init__(self, page: Page, url: str, folder: Path | None = None) -> None:
        self.page = page
        self.clicks = 0
        self._url = url
        self._folder = folder

    def start(self) -> None:
        """Opens the start page, and counts clicks from there."""
        self.page.goto(self._url)
        self.clicks = 0

    def open(self, path: str) -> None:
        """Opens a page by its address."""
        self.page.goto(self._url + path)

    def click(self, what: Locator) -> None:
        """Clicks, and counts it."""
        what.click()
        self.clicks += 1

    def click_through(self, what: Locator) -> None:
        """Clicks what opens another tab, and goes on there."""
        with self.page.context.expect_page() as opened:
            self.click(what)
        self.page = opened.value

    def click_link(self, name: str) -> None:
        """Clicks the first link of that name."""
        self.click(self.page.get_by_role("link", name=name).first)

    def shoot(self, name: str) -> None:
        """Takes a screenshot, if they are wanted."""
        if self._folder:
            self.page.mouse.move(WINDOW["width"] / 2, 20, steps=5)  # away from what shows a menu
            self.page.wait_for_timeout(1000)  # for animations and pictures
            self.page.screenshot(path=self._folder / f"{name}.png")

    def read_entries(self) -> dict[str, str]:
        """Returns the metadata that the page shows without another click, as text by key."""
        rows = self.page.locator("tr:has(> td:nth-child(2))")
        texts = [row.locator("> td").all_inner_texts() for row in rows.all()]
        return {cells[0].strip(): cells[1].strip() for cells in texts}


@contextmanager
def open_ui(url: str, folder: Path | None = None) -> Iterator[Ui]:
    """Opens a browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        page = browser.new_page(viewport=WINDOW)
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        yield Ui(page, url, folder)
        browser.close()
