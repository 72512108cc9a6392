"""A stand-in for OpenAI's Batch API: it checks each request as OpenAI does, and answers it.

It can kill its client before or after any request, to show that nothing is paid twice.
"""

import base64
import io
import json
import os
import re
import signal
from collections import Counter

from PIL import Image
from werkzeug import Response

from imagepipeline_tests.services.test_vision import METADATA, completion

MAX_REQUESTS, MAX_BYTES, MAX_ID_CHARACTERS = 50_000, 200_000_000, 64


class BatchServer:
    """The state of a provider: its files and batches, and what it was asked.

    Attributes:
        charged: how often each request was answered for money, by `custom_id`.
        calls: how often each route was asked.
        sizes: of the uploaded files in bytes.
        states: what a new batch goes through, one step each time it is looked at.
        faults: how requests fail, by their position in a file: a status, or `expired`.
        kills: when to kill the client: a route, and `before` or `after` it has had its effect.
        answers: what routes answer, without any effect, instead of what they should.
    """

    def __init__(self, server):
        self.files, self.batches, self.sizes = {}, {}, []
        self.charged, self.calls = Counter(), Counter()
        self.states = ["validating", "in_progress", "finalizing", "completed"]
        self.faults, self.kills, self.answers = {}, [], {}
        self.error_code = "token_limit_exceeded"
        self.client_pid = None
        server.expect_request(re.compile("/v1/(files|batches).*")).respond_with_handler(self)

    def __call__(self, request):
        route, handle = self.find_route(request)
        self.calls[route] += 1
        if self.kill(route, "before"):
            return Response("", 500)
        answer = self.answers[route] if route in self.answers else handle()
        self.kill(route, "after")
        return answer

    def kill(self, route, moment):
        if not self.kills or self.kills[0] != (route, moment):
            return False
        self.kills.pop(0)
        os.kill(self.client_pid, signal.SIGKILL)
        return True

    def find_route(self, request):
        assert request.headers["Authorization"] == "Bearer sk-canary"
        parts = request.path.removeprefix("/v1/").split("/")
        if parts == ["files"]:
            return "upload", lambda: self.upload(request)
        if parts[0] == "files" and parts[-1] == "content":
            return "content", lambda: Response(self.files[parts[1]], mimetype="text/plain")
        if parts[0] == "files":
            return "delete", lambda: self.answer(self.delete(parts[1]))
        if len(parts) == 2:
            return "retrieve", lambda: self.answer(self.advance(self.batches[parts[1]]))
        if request.method == "POST":
            return "create", lambda: self.answer(self.create(**request.get_json()))
        return "list", lambda: self.answer(self.list_batches(**request.args))

    def answer(self, content, status=200):
        return Response(json.dumps(content), status, content_type="application/json")

    def upload(self, request):
        assert request.form["purpose"] == "batch"
        content = request.files["file"].read()
        assert 0 < len(content) <= MAX_BYTES
        self.sizes.append(len(content))
        return self.answer({"id": self.store(content), "object": "file", "purpose": "batch"})

    def store(self, content):
        file_id = f"file-{len(self.files) + 1}"
        self.files[file_id] = content
        return file_id

    def delete(self, file_id):
        self.files[file_id] = None
        return {"id": file_id, "object": "file", "deleted": True}

    def create(self, input_file_id, endpoint, completion_window):
        assert (endpoint, completion_window) == ("/v1/chat/completions", "24h")
        batch = {
            "id": f"batch_{len(self.batches) + 1}",
            "object": "batch",
            "endpoint": endpoint,
            "input_file_id": input_file_id,
            "completion_window": completion_window,
            "created_at": 1,
            "status": self.states[0],
            "errors": None,
            "output_file_id": None,
            "error_file_id": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "states": self.states[1:],
        }
        self.batches[batch["id"]] = batch
        return batch

    def list_batches(self, limit, after=None):
        newest_first = [*self.batches.values()][::-1]
        ids = [batch["id"] for batch in newest_first]
        start = ids.index(after) + 1 if after else 0
        page = newest_first[start : start + int(limit)]
        return {"object": "list", "data": page, "has_more": start + len(page) < len(ids)}

    def advance(self, batch):
        """Brings a batch one step further; its requests are answered when it ends."""
        if not batch["states"]:
            return batch
        batch["status"] = batch["states"].pop(0)
        if batch["status"] == "failed":
            batch["errors"] = {"object": "list", "data": [{"code": self.error_code, "line": None}]}
        if batch["status"] in ("completed", "expired"):
            self.work(batch)
        return batch

    def work(self, batch):
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        assert 0 < len(lines) <= MAX_REQUESTS
        assert len({line["custom_id"] for line in lines}) == len(lines)
        output, errors = [], []
        for position, line in enumerate(lines):
            check_request(line)
            fault = self.faults.get(position)
            if fault is None:
                self.charged[line["custom_id"]] += 1
                output.append(describe(line, 200, completion(METADATA | speak(line["body"]))))
            elif fault == "prose":
                self.charged[line["custom_id"]] += 1
                output.append(describe(line, 200, completion("Sure! It is a cat.")))
            elif fault == "expired":
                error = {"code": "batch_expired", "message": "not within 24 h"}
                errors.append({"custom_id": line["custom_id"], "response": None, "error": error})
            else:
                errors.append(describe(line, fault, {"error": {"message": "no"}}))
        output.reverse()  # OpenAI promises no order
        counts = {"total": len(lines), "completed": len(output), "failed": len(errors)}
        batch["request_counts"] = counts
        for name, found in (("output_file_id", output), ("error_file_id", errors)):
            if found:
                batch[name] = self.store("".join(json.dumps(one) + "\n" for one in found).encode())


def describe(line, status, body):
    """A line of a file of answers."""
    response = {"status_code": status, "request_id": "req-1", "body": body}
    return {
        "id": "batch_req_1",
        "custom_id": line["custom_id"],
        "response": response,
        "error": None,
    }


def speak(body):
    """The languages of an answer, if its schema asks for them."""
    schema = body["response_format"]["json_schema"]["schema"]["properties"]
    asked = schema.get("languages", {"properties": {}})["properties"]
    return {"languages": {tag: METADATA | {"altText": "A cat"} for tag in asked}} if asked else {}


def check_request(line):
    """Checks a line as OpenAI does: the shape of a request, and that its picture can be read."""
    assert set(line) == {"custom_id", "method", "url", "body"}
    assert 0 < len(line["custom_id"]) <= MAX_ID_CHARACTERS
    assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
    body = line["body"]
    assert body["model"]
    assert body["response_format"]["json_schema"]["strict"] is True
    [message] = body["messages"]
    [text, picture] = message["content"]
    assert text["text"]
    prefix, _, content = picture["image_url"]["url"].partition(",")
    assert prefix == "data:image/jpeg;base64"
    assert max(Image.open(io.BytesIO(base64.b64decode(content, validate=True))).size) <= 1024
