"""The soak's uploads: an app that stores originals and pushes IDs, whatever is down."""

import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from imagepipeline.errors import ImagePipelineError
from imagepipeline.storage import Storage
from imagepipeline.stores.connection import translated_errors
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline_tests.end_to_end.soak_machines import Host
from imagepipeline_tests.end_to_end.soak_pictures import BAD, FORMATS, NUMBERS, SIZES, draw
from imagepipeline_tests.end_to_end.soak_provider import Provider

LARGE_FILES = ("bmp", "tif")  # not compressed
# How often each kind of upload occurs beside the others.
KINDS = {
    "new": 62,
    "again": 10,  # the same ID with another picture
    "spoilt": 2,  # the same ID with a bad file
    "pushed twice": 5,
    "twin": 4,  # the same picture under another ID
    "bad": 9,
    "missing": 2,
    "refused": 2,  # the provider describes it to nobody
    "unreadable": 2,  # an entry that is no upload
    "erased": 2,
}
UNREADABLE = (b"../etc/passwd%d", b"\xff\xfe%d", b"{%d", b"a b %d", b'{"imageId": [%d]}')
PATIENCE_SECONDS = 300


@dataclass
class Expected:
    """What must become of an image.

    Attributes:
        status: `completed`, `failed`, or `erased`.
        reason: of a failure.
        pictures: the numbers of all its pictures; the last one counts.
    """

    status: str
    reason: str | None
    extension: str
    size: tuple[int, int]
    pictures: list[int] = field(default_factory=list)


class App:
    """Uploads pictures and keeps in mind what must become of each.

    Args:
        seed: by which uploads are drawn.
        files: where originals are stored.
        queue: where IDs are pushed.
        provider: which learns whom to refuse.
        host: where images are erased.
    """

    def __init__(
        self, seed: int, files: Storage, queue: UploadQueue, provider: Provider, host: Host
    ) -> None:
        self.expected: dict[str, Expected] = {}
        self.counts: Counter[str] = Counter()
        self.unreadable = 0
        self.problems: list[str] = []
        self._random = random.Random(seed)
        self._files, self._queue, self._provider, self._host = files, queue, provider, host
        # Scattered, so that pictures that follow each other look different.
        self._next, self._step = self._random.randrange(NUMBERS), 100_003
        self._erasing: list[threading.Thread] = []

    def run(self, count: int, seconds: float) -> None:
        """Makes uploads, evenly spread but for some bursts; returns when all are pushed."""
        began = time.monotonic()
        for number in range(count):
            # Twelve at once now and then.
            due = number if number % 60 >= 12 else number - number % 60
            time.sleep(max(0.0, due * seconds / count - (time.monotonic() - began)))
            self._upload(self._random.choices([*KINDS], [*KINDS.values()])[0])
        for thread in self._erasing:
            thread.join()

    def _upload(self, kind: str) -> None:
        good = [
            name
            for name, one in self.expected.items()
            if one.status == "completed" and one.reason is None
        ]
        if kind in ("again", "spoilt", "pushed twice", "twin", "erased") and not good:
            kind = "new"
        self.counts[kind] += 1
        if kind == "unreadable":
            self.unreadable += 1
            entry = self._random.choice(UNREADABLE) % self.unreadable
            self._insist(lambda: self._push_entry(entry))
        elif kind in ("again", "spoilt"):
            self._replace(self._random.choice(good), kind == "spoilt")
        elif kind == "pushed twice":
            self._push(self._random.choice(good))
        elif kind == "erased":
            self._erase(self._random.choice(good))
        else:
            self._add(f"image{len(self.expected)}", kind, good)

    def _add(self, image_id: str, kind: str, good: list[str]) -> None:
        if kind == "twin":
            model = self.expected[self._random.choice(good)]
            one = Expected("completed", None, model.extension, model.size, [model.pictures[-1]])
        else:
            one = self._draw_expected()
        content = draw(one.pictures[-1], one.extension, one.size)
        if kind == "bad":
            bad = BAD[self._random.choice([*BAD])]
            one.status, one.reason, one.extension = "failed", bad.reason, bad.extension
            content = bad.spoil(one.pictures[-1])
        elif kind in ("missing", "refused"):
            one.status, one.reason = "failed", kind
        if kind == "refused":
            self._provider.refused.add(one.pictures[-1])
        self.expected[image_id] = one
        if kind != "missing":
            self._store(image_id, one.extension, content)
        self._push(image_id)

    def _replace(self, image_id: str, is_spoilt: bool) -> None:
        one = self.expected[image_id]
        one.pictures.append(self._take_number())
        content = draw(one.pictures[-1], one.extension, one.size)
        if is_spoilt:
            one.status, one.reason, content = "failed", "empty", b""
        self._store(image_id, one.extension, content)
        self._push(image_id)

    def _draw_expected(self) -> Expected:
        extension = self._random.choice([*FORMATS])
        sizes = SIZES[:3] if extension in LARGE_FILES else SIZES
        return Expected(
            "completed", None, extension, self._random.choice(sizes), [self._take_number()]
        )

    def _take_number(self) -> int:
        self._next = (self._next + self._step) % NUMBERS
        return self._next

    def _store(self, image_id: str, extension: str, content: bytes) -> None:
        self._insist(lambda: self._files.put_original(image_id, content, extension))

    def _push_entry(self, entry: bytes) -> None:
        with translated_errors():
            self._queue.redis.lpush(self._queue.wait_key, entry)

    def _push(self, image_id: str) -> None:
        self._insist(lambda: self._queue.enqueue(image_id))

    def _erase(self, image_id: str) -> None:
        self.expected[image_id].status = "erased"
        thread = threading.Thread(target=self._insist_on_erasing, args=(image_id,), daemon=True)
        thread.start()
        self._erasing.append(thread)

    def _insist_on_erasing(self, image_id: str) -> None:
        command = [sys.executable, "-m", "imagepipeline.cli", "erase", image_id]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            done = subprocess.run(
                command, env=self._host.environment, capture_output=True, text=True, check=False
            )
            # The second time there may be nothing left to erase.
            if done.returncode == 0 or "nothing is known of it" in done.stdout:
                return
            if time.monotonic() > deadline:
                self.problems.append(f"{image_id} could not be erased: {done.stderr[-500:]}")
                return
            time.sleep(2)

    def _insist(self, act: Callable[[], object]) -> None:
        """Does what an app must do until it succeeds: the disk may be full, or Redis down."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                act()
                return
            except (ImagePipelineError, OSError) as error:
                if time.monotonic() > deadline:
                    self.problems.append(f"an upload was not accepted: {error}")
                    return
                time.sleep(0.5)
