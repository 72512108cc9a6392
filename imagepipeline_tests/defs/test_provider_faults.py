"""Many images are processed with a provider that fails 30 % of its calls, is down, or limits them.

All images end, and the costs add up. The test uses 12 images; for more, run
`PROVIDER_FAULT_IMAGES=200 pytest imagepipeline_tests/defs/test_provider_faults.py`.
"""

import json
import os
import random
from collections import Counter
from contextlib import closing
from datetime import timedelta

import dagster as dg
import pytest
from PIL import Image
from werkzeug import Response

from imagepipeline.defs.assets import variants
from imagepipeline.defs.attempts import GENERATION_TAG
from imagepipeline.defs.sensors import upload_sensor
from imagepipeline.models import Recipe, Upload, now_utc
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.services.embedder import OpenRouterEmbedder
from imagepipeline.services.vision import OpenAIVision, VisionOptions
from imagepipeline.stores.ledger import Ledger
from imagepipeline.tenants import Tenants
from imagepipeline_tests.imaging.odd_files import encode
from imagepipeline_tests.services.test_embedder import answer_of
from imagepipeline_tests.services.test_vision import METADATA, completion

pytestmark = pytest.mark.stack

IMAGE_COUNT = int(os.environ.get("PROVIDER_FAULT_IMAGES", "12"))
FAULT_SHARE = 0.3
REASONS = {"provider_unavailable", "bad_output", "refused", "provider_rejected"}


class Provider:
    """Answers or fails at random with a fixed seed, and counts what it would charge."""

    def __init__(self):
        self.rng = random.Random(5)
        self.calls = Counter()
        self.tokens = Counter()

    def __call__(self, request):
        is_chat = request.path.endswith("completions")
        stage = "metadata" if is_chat else "embedding"
        self.calls[stage] += 1
        faults = ["429", "500", "404", "html"] + ["prose", "missing", "refusal"] * is_chat
        fault = self.rng.choice(faults) if self.rng.random() < FAULT_SHARE else None
        if fault in ("429", "500", "404"):
            return Response(
                json.dumps({"error": {"message": "no"}}), int(fault), {"Retry-After": "0"}
            )
        if fault == "html":
            return Response("<html>", 200)
        answer = answer_of([1.0, 2.0, 3.0])
        if is_chat:
            content = {"prose": "Sure!", "missing": {"mood": "calm"}, "refusal": None}.get(
                fault, METADATA
            )
            answer = completion(content, refusal="no" if fault == "refusal" else None)
            answer["usage"]["cost"] = 0.002
        usage = answer["usage"]
        self.tokens["in"] += usage["prompt_tokens"]
        self.tokens["out"] += usage.get("completion_tokens", 0)
        self.tokens["millionths of a USD"] += round(usage["cost"] * 1_000_000)
        return Response(json.dumps(answer), content_type="application/json")


def test_all_images_end_after_few_calls_and_the_costs_add_up(
    httpserver, run, catalogue, files, ledger, limiter
):
    provider = Provider()
    httpserver.expect_request("/v1/chat/completions").respond_with_handler(provider)
    httpserver.expect_request("/v1/embeddings").respond_with_handler(provider)
    url = httpserver.url_for("/v1")
    outcomes = Counter()
    for number in range(IMAGE_COUNT):
        image_id = f"image-{number}"
        files.put_original(
            image_id, encode(Image.new("RGB", (40, 30), (number % 256, 90, 40)), "PNG"), "png"
        )
        catalogue.accept([Upload(image_id)])
        before = provider.calls.copy()
        run(
            image_id,
            generation=1,
            vision=OpenAIVision("k", url, "m", "p", VisionOptions()),
            embedder=OpenRouterEmbedder("k", url, "e"),
            paid_calls=PaidCalls(ledger, limiter, {}),
        )
        row = catalogue.get(image_id)
        outcomes[row["reason"] or row["status"]] += 1
        assert row["status"] == "completed" or row["reason"] in REASONS, row
        assert max((provider.calls - before).values()) <= 3
    assert sum(outcomes.values()) == IMAGE_COUNT
    assert outcomes["completed"] > IMAGE_COUNT / 2
    rows = {row["stage"]: row for row in ledger.summarize("stage")}
    assert {stage: row["calls"] for stage, row in rows.items()} == dict(provider.calls)
    assert sum(row["tokens_in"] for row in rows.values()) == provider.tokens["in"]
    assert sum(row["tokens_out"] for row in rows.values()) == provider.tokens["out"]
    cost_usd = sum(row["cost_usd"] for row in rows.values())
    assert round(cost_usd * 1_000_000) == provider.tokens["millionths of a USD"]
    print(dict(outcomes), dict(provider.calls), f"{cost_usd:.4f} USD")


class Pipeline:
    """A pipeline with real sensors and runs, a scripted provider, and a clock that can be advanced.

    Attributes:
        answer: takes the number of a call for a description, from 1; returns the status to answer
            with, or None for 200.
    """

    def __init__(self, httpserver, run, instance, queue, catalogue, files, limiter, database_url):
        self.answer = lambda number: None
        self.calls = Counter()
        self.ends = Counter()
        self.elapsed = timedelta(0)
        self.instance, self.queue, self.catalogue, self.files, self.limiter = (
            instance,
            queue,
            catalogue,
            files,
            limiter,
        )
        self._run = run
        self.ledger = Ledger(database_url, lambda: now_utc() + self.elapsed)
        httpserver.expect_request("/v1/chat/completions").respond_with_handler(self._describe)
        httpserver.expect_request("/v1/embeddings").respond_with_handler(self._embed)
        url = httpserver.url_for("/v1")
        self._models = {
            "vision": OpenAIVision("k", url, "m", "p", VisionOptions()),
            "embedder": OpenRouterEmbedder("k", url, "e"),
        }
        recipes = {"metadata": Recipe("openai", "m"), "embedding": Recipe("openrouter", "e")}
        self.paid_calls = PaidCalls(
            self.ledger, limiter, {}, clock=lambda: now_utc() + self.elapsed, recipes=recipes
        )

    def push(self, count):
        for number in range(count):
            picture = encode(Image.new("RGB", (40, 30), (number, 90, 40)), "PNG")
            self.files.put_original(f"image-{number}", picture, "png")
            self.queue.enqueue(f"image-{number}")

    def tick(self):
        """Runs a tick and the runs it requests.

        Returns the number of runs that make all assets, or why there are none. Runs that make
        variants alone, while paid work waits, are not counted.
        """
        resources = {
            "queue": self.queue,
            "catalogue": self.catalogue,
            "ledger": self.ledger,
            "applier": self.applier,
            "tenants": Tenants(self.catalogue, self.ledger, {}, {}),
        }
        context = dg.build_sensor_context(
            instance=self.instance, resources={**resources, "paid_calls": self.paid_calls}
        )
        result = upload_sensor(context)
        if isinstance(result, dg.SkipReason):
            return result.skip_message
        full = [request for request in result.run_requests if request.asset_selection is None]
        for request in result.run_requests:
            generation = int(request.tags[GENERATION_TAG])
            is_full = request in full
            ended = self._run(
                request.partition_key,
                generation,
                **({} if is_full else {"assets": [variants]}),
                paid_calls=self.paid_calls,
                **self._models,
            )
            self.ends[ended.success] += is_full
        return len(full) or self.tick()

    def _describe(self, request):
        self.calls["metadata"] += 1
        status = self.answer(self.calls["metadata"])
        if status:
            return Response(
                json.dumps({"error": {"message": "no"}}), status, content_type="application/json"
            )
        answer = METADATA | {"description": f"Picture {self.calls['metadata']}"}
        return Response(json.dumps(completion(answer)), content_type="application/json")

    def _embed(self, request):
        self.calls["embedding"] += 1
        return Response(json.dumps(answer_of([1.0, 2.0, 3.0])), content_type="application/json")


@pytest.fixture
def pipeline(
    httpserver, run, instance, queue, catalogue, files, limiter, sqlite_catalogue_url, applier
):
    pipeline = Pipeline(
        httpserver, run, instance, queue, catalogue, files, limiter, sqlite_catalogue_url
    )
    pipeline.applier = applier
    with closing(pipeline.ledger):
        yield pipeline


def test_a_provider_outage_fails_no_image_and_sends_no_failure(pipeline, outbox):
    pipeline.push(4)
    pipeline.answer = lambda number: 503
    assert pipeline.tick() == 4  # two fail before the third shows that the provider is down
    assert pipeline.catalogue.count()["failed"] == 2
    assert "provider_down" in pipeline.tick()
    assert pipeline.catalogue.count()["pending"] == 4
    assert outbox.list_unsent("mail") == []
    known = pipeline.calls["metadata"]
    for probes in (1, 2):
        pipeline.elapsed += timedelta(seconds=31)
        assert pipeline.tick() == 1
        assert "provider_down" in pipeline.tick()
        assert pipeline.calls["metadata"] == known + probes
    pipeline.answer = lambda number: None
    pipeline.elapsed += timedelta(seconds=31)
    assert pipeline.tick() == 1
    assert pipeline.tick() == 3
    assert pipeline.catalogue.count()["completed"] == 4
    assert pipeline.ledger.list_pauses() == []


def test_an_image_that_alone_gets_no_answer_fails(pipeline):
    pipeline.push(4)
    pipeline.answer = lambda number: 503 if number <= 3 else None
    assert pipeline.tick() == 4
    assert pipeline.catalogue.count() | {"completed": 3, "failed": 1} == pipeline.catalogue.count()
    assert pipeline.catalogue.get("image-0")["reason"] == "provider_unavailable"
    assert pipeline.ledger.list_pauses() == []


def test_no_run_fails_because_of_a_daily_rate_limit(pipeline):
    pipeline.limiter.set_limits("10/day")
    pipeline.push(12)
    pipeline.tick()
    for _ in range(5):
        assert "(10/day) is used up: paid work resumes at " in pipeline.tick()
    assert (pipeline.ends, pipeline.calls.total()) == ({True: 5}, 10)
    pipeline.limiter.set_limits("metadata=4/day,embedding=100/minute")
    pipeline.tick()
    for _ in range(5):
        assert "is used up" in pipeline.tick()
    pipeline.limiter.set_limits("off")  # takes effect at once
    pipeline.tick()
    assert pipeline.ends == {True: 12}
    assert pipeline.catalogue.count()["completed"] == 12


def test_unexpected_calls_over_the_rate_limit_fail_no_image_and_no_run(pipeline):
    pipeline.limiter.set_limits("5/day")
    pipeline.push(4)
    pipeline.answer = lambda number: 500 if number == 1 else None  # so one image needs three calls
    while not isinstance(pipeline.tick(), str):
        pass
    assert pipeline.calls.total() == 5
    assert pipeline.ends[False] == 0
    assert pipeline.catalogue.count()["failed"] == 0
    pipeline.limiter.set_limits("off")
    while not isinstance(pipeline.tick(), str):
        pass
    assert pipeline.catalogue.count()["completed"] == 4
    assert pipeline.calls["metadata"] == 5  # answered calls are not repeated
