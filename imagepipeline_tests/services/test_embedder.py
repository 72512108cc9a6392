"""The remote embedder against a real HTTP server."""

import json
import math

import pytest
from werkzeug import Request, Response

from imagepipeline.errors import BadAnswerError, PausedError, ProviderUnavailableError, RefusedError
from imagepipeline.services.embedder import OpenRouterEmbedder
from imagepipeline.usage import CallUsage


def answer_of(vector):
    return {
        "object": "list",
        "model": "m",
        "data": [{"object": "embedding", "index": 0, "embedding": vector}],
        "usage": {"prompt_tokens": 4, "total_tokens": 4, "cost": 0.0001},
    }


@pytest.fixture
def embedder(httpserver):
    return OpenRouterEmbedder(
        "sk-canary", httpserver.url_for("/api/v1"), "openai/text-embedding-3-small"
    )


def test_a_text_becomes_a_vector_of_unit_length(httpserver, embedder):
    bodies = []

    def answer(request: Request) -> Response:
        bodies.append(request.get_json())
        return Response(json.dumps(answer_of([3.0, 4.0])), content_type="application/json")

    httpserver.expect_request("/api/v1/embeddings", method="POST").respond_with_handler(answer)
    embedding = embedder.embed("a cat")
    assert embedding.vector == pytest.approx((0.6, 0.8))
    assert (embedding.text, embedding.usage) == ("a cat", CallUsage(4, 0, 0.0001))
    assert embedding.version == "openrouter:openai/text-embedding-3-small"
    assert bodies == [
        {"input": "a cat", "model": "openai/text-embedding-3-small", "encoding_format": "float"}
    ]


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (503, {}, ProviderUnavailableError),
        (401, {"error": {"message": "no"}}, PausedError),
        (200, {"error": {"message": "no"}}, BadAnswerError),
        (200, {"error": {"message": "no", "code": 502}}, ProviderUnavailableError),
        (403, {"error": {"message": "Your input was flagged"}}, RefusedError),
        (200, answer_of([0.0, 0.0]), BadAnswerError),
        (200, answer_of([math.nan, 1.0]), BadAnswerError),
        (200, answer_of([]), BadAnswerError),
    ],
)
def test_every_kind_of_failure_raises_one_of_our_errors(httpserver, embedder, status, body, error):
    httpserver.expect_request("/api/v1/embeddings").respond_with_json(body, status)
    with pytest.raises(error):
        embedder.embed("a cat")
    assert len(httpserver.log) == 1


@pytest.mark.parametrize("data", [[], answer_of([0.0])["data"]])
def test_an_unusable_answer_is_still_charged(httpserver, embedder, data):
    answer = answer_of([]) | {"data": data}
    httpserver.expect_request("/api/v1/embeddings").respond_with_json(answer)
    with pytest.raises(BadAnswerError) as caught:
        embedder.embed("a cat")
    assert caught.value.usage == CallUsage(4, 0, 0.0001)
