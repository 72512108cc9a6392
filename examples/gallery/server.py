"""The gallery again, for an app in Python: the same page, served by this file alone.

    imagepipeline up                     # in another terminal
    python examples/gallery/server.py    # prints its address

Arguments: the URL of Redis and the storage root, as `imagepipeline up` prints them, and the port.
For a socket, the URL is `unix://` and its path. The search runs `imagepipeline search`, which must
be on the PATH and takes about a second. This needs the package `redis` only.
"""

import json
import queue
import re
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import redis

DEFAULTS = [f"unix://{Path('.imagepipeline/sockets/valkey.sock').absolute()}"]
DEFAULTS += [".imagepipeline/storage", "8080"]
REDIS_URL, STORAGE, PORT = sys.argv[1:] + DEFAULTS[len(sys.argv) - 1 :]
KEY, GROUP = "image-processing:events", "gallery-python"
MAX_BYTES = 50_000_000
PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript"),
}
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'",
}
server = redis.Redis.from_url(REDIS_URL)
pages: set[queue.SimpleQueue] = set()  # open pages, which are told of events
lock = threading.Lock()  # of the database
database = sqlite3.connect("gallery.sqlite", check_same_thread=False)  # yours is a real one
database.execute(
    "CREATE TABLE IF NOT EXISTS images (id TEXT PRIMARY KEY, generation INTEGER, event TEXT)"
)


def save(event: str) -> None:
    """Keep the last event of an image, and show it.

    Events come at least once and in order for each image, so saving one twice changes nothing.
    """
    told = json.loads(event)
    with lock, database:
        if told["type"] == "image.erased":
            database.execute("DELETE FROM images WHERE id = ?", [told["imageId"]])
        else:
            database.execute(
                "INSERT INTO images VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET event = "
                "excluded.event, generation = excluded.generation "
                "WHERE excluded.generation >= generation",
                [told["imageId"], told["generation"], event],
            )
    for page in list(pages):
        page.put(event)


def consume() -> None:
    """Read the stream for ever: first what was not acknowledged before a crash, then the new."""
    last = "0"
    while True:
        try:
            if last == "0":
                try:
                    server.xgroup_create(KEY, GROUP, id="0", mkstream=True)
                except redis.ResponseError as error:
                    if not str(error).startswith("BUSYGROUP"):  # it exists already
                        raise
            # For less time than the client waits for an answer, which is 5 s.
            found = server.xreadgroup(GROUP, "one", {KEY: last}, count=100, block=2000)
            entries = found[0][1] if found else []
            if not entries:
                last = ">"
            for entry, fields in entries:
                if fields:  # empty: it was deleted meanwhile
                    save(fields[b"event"].decode())
                server.xack(KEY, GROUP, entry)
        except (redis.ConnectionError, redis.TimeoutError):
            last = "0"
            time.sleep(1)


def list_images() -> dict[str, dict]:
    """The last event of each image, by its ID."""
    with lock:
        rows = database.execute("SELECT id, event FROM images ORDER BY rowid").fetchall()
    return {image_id: json.loads(event) for image_id, event in rows}


def search(text: str) -> list[dict]:
    """The images nearest in meaning."""
    command = ["imagepipeline", "search", "--json", "-k", "20", "--", text]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    images = list_images()
    return [images[row["image_id"]] for row in found if row["image_id"] in images]


class Gallery(BaseHTTPRequestHandler):
    """Answers one request."""

    def do_GET(self) -> None:
        """Serve the page, its data, its events, or a variant."""
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if url.path in PAGES:
            name, kind = PAGES[url.path]
            self.answer(200, Path(__file__).with_name(name).read_bytes(), kind)
        elif url.path == "/images":
            self.answer(200, json.dumps(list(list_images().values())).encode())
        elif url.path == "/search" and "q" in query:
            self.answer(200, json.dumps(search(query["q"][0])).encode())
        elif url.path == "/events":
            self.stream()
        elif match := re.fullmatch(r"/(variants/[\w-]+\.(webp|avif))", url.path, re.ASCII):
            path = Path(STORAGE, match[1])
            # The page adds the generation to the address, so that a new content has a new one.
            caching = "public, max-age=31536000, immutable" if "g" in query else "no-cache"
            if path.is_file():
                self.answer(200, path.read_bytes(), f"image/{match[2]}", caching)
            else:
                self.answer(404)
        else:
            self.answer(404)

    def do_POST(self) -> None:
        """Store an upload as an original, then push its ID."""
        match = re.fullmatch(r"/upload/(\w{1,8})", self.path, re.ASCII)
        size = self.headers.get("Content-Length", "")
        if not match or self.headers.get("Origin") != f"http://{self.headers.get('Host')}":
            return self.answer(403)
        if not size.isdecimal() or int(size) > MAX_BYTES:
            return self.answer(413)
        image_id = str(uuid.uuid4())  # never from the request
        content = self.rfile.read(int(size))
        if len(content) < int(size):  # the browser has gone
            return self.answer(400)
        original = Path(STORAGE, "original", f"{image_id}.{match[1].lower()}")
        original.parent.mkdir(parents=True, exist_ok=True)
        part = original.with_name(f".{image_id}.part")
        part.write_bytes(content)
        part.rename(original)  # no run ever reads half a file
        server.lpush("image-processing:wait", image_id)
        return self.answer(201, json.dumps({"imageId": image_id}).encode())

    def stream(self) -> None:
        """Send events to the page until it is closed."""
        self.answer(200, b": hello\n\n", "text/event-stream", "no-store")
        page: queue.SimpleQueue[str] = queue.SimpleQueue()
        pages.add(page)
        try:
            while True:
                try:
                    self.wfile.write(f"data: {page.get(timeout=15)}\n\n".encode())
                except queue.Empty:
                    self.wfile.write(b": still here\n\n")
        except OSError:  # the page is closed
            pages.discard(page)

    def answer(
        self,
        status: int,
        body: bytes = b"{}",
        kind: str = "application/json",
        caching: str = "no-cache",
    ) -> None:
        """Send an answer."""
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Cache-Control": caching}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


threading.Thread(target=consume, daemon=True).start()
gallery = ThreadingHTTPServer(("127.0.0.1", int(PORT)), Gallery)
print(f"http://127.0.0.1:{gallery.server_port}", flush=True)
gallery.serve_forever()
