"""A stand-in for both paid providers that sees which picture it is asked about, and misbehaves.

Each machine asks at an address of its own. The number of each call is in the tokens of its answer,
so the ledger's rows can be compared with what was really answered, call by call.
"""

import base64
import contextlib
import hashlib
import io
import json
import random
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from imagepipeline_tests.end_to_end.soak_pictures import read_number

SLOW_SECONDS, HANG_SECONDS = 8, 75  # the pipeline gives up after 60 s without data
DIMENSIONS = 16
FAULT_SHARE = 0.12  # of the calls, beside outages
FAULTS = ("429", "500", "503", "hang", "slow", "cut", "half", "malformed", "html")
OUTAGES = ("429", "500", "hang", "slow", "cut", "malformed")


@dataclass
class Call:
    """A call: when it was made and, by the monotonic clock, answered, and how."""

    number: int
    machine: str
    stage: str
    picture: int
    asked: float
    fault: str | None
    answered: float | None = None

    @property
    def is_answered(self) -> bool:
        """Whether a complete and valid answer was sent: one that is paid for."""
        return self.answered is not None and self.fault in (None, "slow")


class Provider:
    """The stand-in; `outage` is the fault that all calls have at the moment, or None.

    After a fault, calls for that picture have others only in outages: three that do not mean one
    would fail its image, which is right but tells nothing.
    """

    def __init__(self, seed: int) -> None:
        self.calls: list[Call] = []
        self.outage: str | None = None
        self.is_calm = threading.Event()
        self.refused: set[int] = set()
        self._random = random.Random(seed)
        self._faulty: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        provider = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                _, machine, *_ = self.path.split("/")
                call = provider.begin(machine, asked)
                self.close_connection = True
                with contextlib.suppress(OSError):  # who asked was killed
                    if self._send(call, asked):
                        call.answered = time.monotonic()

            def _send(self, call: Call, asked: dict[str, Any]) -> bool:
                """Returns whether the answer was sent completely."""
                if call.fault == "hang":
                    provider.is_calm.wait(HANG_SECONDS)
                if call.fault in ("hang", "cut"):
                    return False
                provider.is_calm.wait(SLOW_SECONDS if call.fault == "slow" else 0.0)
                time.sleep(0.3 if call.stage == "metadata" else 0.05)
                status, answer = provider.answer(call, asked)
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Connection", "close")
                if status == 429:
                    self.send_header("Retry-After", "2")
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if call.fault == "half" else body)
                return call.fault != "half"

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def url_for(self, machine: str) -> str:
        """The address at which a machine asks."""
        return f"http://127.0.0.1:{self._server.server_port}/{machine}/v1"

    def begin(self, machine: str, asked: dict[str, Any]) -> Call:
        """Records a call and decides what becomes of it."""
        stage = "embedding" if "input" in asked else "metadata"
        picture = _read_text(asked) if stage == "embedding" else _read_picture(asked)
        with self._lock:
            fault = None if self.is_calm.is_set() else self.outage
            is_unlucky = not self.is_calm.is_set() and self._random.random() < FAULT_SHARE
            if fault is None and is_unlucky and (stage, picture) not in self._faulty:
                fault = self._random.choice(FAULTS)
            if fault is not None:
                self._faulty.add((stage, picture))
            number = len(self.calls) + 1
            call = Call(number, machine, stage, picture, time.monotonic(), fault)
            self.calls.append(call)
        return call

    def answer(self, call: Call, asked: dict[str, Any]) -> tuple[int, dict[str, Any] | bytes]:
        """Returns the status and the body of an answer."""
        if call.fault in ("429", "500", "503"):
            return int(call.fault), {"error": {"message": "try again"}}
        if call.fault == "html":
            return 200, b"<html>Bad gateway</html>"
        usage = {"prompt_tokens": call.number, "completion_tokens": 0, "total_tokens": call.number}
        if call.stage == "embedding":
            data = [{"object": "embedding", "index": 0, "embedding": embed(asked["input"])}]
            is_malformed = call.fault == "malformed"
            return 200, {
                "object": "list",
                "model": "m",
                "data": [] if is_malformed else data,
                "usage": usage,
            }
        said = json.dumps(describe(call.picture))
        message = {"role": "assistant", "content": said, "refusal": None}
        if call.picture in self.refused:
            message |= {"content": None, "refusal": "I cannot help with that."}
        elif call.fault == "malformed":
            message["content"] = said[: len(said) // 2]
        return 200, {
            "id": str(call.number),
            "object": "chat.completion",
            "created": 1,
            "model": "gpt-4o-mini",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": usage,
        }

    def count_faults(self) -> Counter[str]:
        """The number of calls by the fault they had."""
        return Counter(call.fault for call in self.calls if call.fault)

    def close(self) -> None:
        """Stops the server."""
        self.is_calm.set()
        self._server.shutdown()
        self._server.server_close()


def describe(picture: int) -> dict[str, Any]:
    """The metadata of a picture."""
    return {
        "description": f"Picture number {picture}.",
        "tags": ["picture"],
        "category": "abstract",
        "dominantColors": ["#aabbcc"],
        "mood": "calm",
    }


def find_number(text: str) -> int:
    """The number of the picture that a text is about; -1 if it says none."""
    found = re.search(r"Picture number (\d+)", text)
    return int(found[1]) if found else -1


def embed(text: str | list[str]) -> list[float]:
    """A vector that depends on the text alone."""
    content = text if isinstance(text, str) else text[0]
    return [byte / 255 + 0.01 for byte in hashlib.sha256(content.encode()).digest()[:DIMENSIONS]]


def _read_text(asked: dict[str, Any]) -> int:
    given = asked["input"]
    return find_number(given if isinstance(given, str) else given[0])


def _read_picture(asked: dict[str, Any]) -> int:
    found = re.search(r"base64,([A-Za-z0-9+/=]+)", json.dumps(asked))
    assert found is not None
    return read_number(Image.open(io.BytesIO(base64.b64decode(found[1]))))
