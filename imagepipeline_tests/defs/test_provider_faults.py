"""Many images against a provider of which three answers in ten go wrong: all end, and the money adds up.

12 images here; `PROVIDER_FAULT_IMAGES=200 pytest imagepipeline_tests/defs/test_provider_faults.py` for more.
"""

import json
import os
import random
from collections import Counter

from PIL import Image
from werkzeug import Response

from imagepipeline.models import Upload
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.services.embedder import OpenRouterEmbedder
from imagepipeline.services.vision import OpenAIVision, VisionOptions
from imagepipeline_tests.imaging.odd_files import encode
from imagepipeline_tests.services.test_embedder import answer_of
from imagepipeline_tests.services.test_vision import METADATA, completion

IMAGE_COUNT = int(os.environ.get("PROVIDER_FAULT_IMAGES", "12"))
FAULT_SHARE = 0.3
REASONS = {"provider_unavailable", "bad_output", "refused", "provider_rejected"}


class Provider:
    """Answers well or badly by a seed, and counts what it would charge for."""

    def __init__(self):
        self.chance = random.Random(5)
        self.calls = Counter()
        self.tokens = Counter()

    def __call__(self, request):
        is_chat = request.path.endswith("completions")
        stage = "metadata" if is_chat else "embedding"
        self.calls[stage] += 1
        faults = ["429", "500", "404", "html"] + ["prose", "missing", "refusal"] * is_chat
        fault = self.chance.choice(faults) if self.chance.random() < FAULT_SHARE else None
        if fault in ("429", "500", "404"):
            return Response(json.dumps({"error": {"message": "no"}}), int(fault), {"Retry-After": "0"})
        if fault == "html":
            return Response("<html>", 200)
        answer = answer_of([1.0, 2.0, 3.0])
        if is_chat:
            content = {"prose": "Sure!", "missing": {"mood": "calm"}, "refusal": None}.get(fault, METADATA)
            answer = completion(content, refusal="no" if fault == "refusal" else None)
            answer["usage"]["cost"] = 0.002
        usage = answer["usage"]
        self.tokens["in"] += usage["prompt_tokens"]
        self.tokens["out"] += usage.get("completion_tokens", 0)
        self.tokens["millionths of a USD"] += round(usage["cost"] * 1_000_000)
        return Response(json.dumps(answer), content_type="application/json")


def test_all_images_end_within_bounds_and_the_cost_adds_up(httpserver, run, catalogue, files, ledger, limiter):
    provider = Provider()
    httpserver.expect_request("/v1/chat/completions").respond_with_handler(provider)
    httpserver.expect_request("/v1/embeddings").respond_with_handler(provider)
    url = httpserver.url_for("/v1")
    outcomes = Counter()
    for number in range(IMAGE_COUNT):
        image_id = f"image-{number}"
        files.put_original(image_id, encode(Image.new("RGB", (40, 30), (number % 256, 90, 40)), "PNG"), "png")
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
