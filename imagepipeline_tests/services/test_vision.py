"""Vision models: the remote one against a real HTTP server, the local one on real photos."""

import base64
import io
import json

import pytest
from PIL import Image
from werkzeug import Request, Response

from imagepipeline.errors import BadAnswerError, ProviderRejectedError, ProviderUnavailableError, RefusedError
from imagepipeline.imaging.decoding import decode
from imagepipeline.imaging.palette import measure
from imagepipeline.imaging.variants import render_preview
from imagepipeline.models import PixelFacts
from imagepipeline.services.vision import LocalVision, OpenAIVision
from imagepipeline_tests.conftest import PHOTOS

FACTS = PixelFacts(4, 3, (("red", "#ff0000", 1.0),), 50, 20, 30, 10)
METADATA = {
    "description": "A cat",
    "tags": ["cat"],
    "category": "animal",
    "dominantColors": ["#aabbcc"],
    "mood": "calm",
}


def completion(content=None, refusal=None, finish_reason="stop"):
    if isinstance(content, dict):
        content = json.dumps(content)
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": content, "refusal": refusal},
            }
        ],
        "usage": {"prompt_tokens": 800, "completion_tokens": 60, "total_tokens": 860},
    }


@pytest.fixture
def vision(httpserver):
    return OpenAIVision("sk-canary", httpserver.url_for("/v1"), "gpt-4o-mini", "Describe it.")


def test_the_image_goes_out_as_a_data_url_and_the_answer_comes_back_typed(httpserver, vision):
    requests = []

    def answer(request: Request) -> Response:
        requests.append((request.headers["Authorization"], request.get_json()))
        return Response(json.dumps(completion(METADATA)), content_type="application/json")

    httpserver.expect_request("/v1/chat/completions", method="POST").respond_with_handler(answer)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "JPEG")
    result = vision.describe(buffer.getvalue(), FACTS)

    assert result.metadata.model_dump(by_alias=True) == METADATA
    assert (result.tokens_in, result.tokens_out) == (800, 60)
    [(authorization, body)] = requests
    assert authorization == "Bearer sk-canary"
    assert body["model"] == "gpt-4o-mini"
    text, picture = body["messages"][0]["content"]
    assert text["text"] == "Describe it."
    header, _, data = picture["image_url"]["url"].partition(",")
    assert header == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (4, 3)
    schema = body["response_format"]["json_schema"]
    assert schema["strict"] is True
    assert set(schema["schema"]["required"]) == set(METADATA)


ERROR = {"error": {"message": "secret body", "type": "t"}}


@pytest.mark.parametrize(
    ("status", "body", "headers", "error", "wait"),
    [
        (429, ERROR, {"Retry-After": "7"}, ProviderUnavailableError, 7),
        (429, ERROR, {"Retry-After": "999"}, ProviderUnavailableError, None),
        (429, ERROR, {"Retry-After": "inf"}, ProviderUnavailableError, None),
        (429, ERROR, {}, ProviderUnavailableError, None),
        (429, {"error": {"code": "insufficient_quota"}}, {}, ProviderRejectedError, None),
        (408, ERROR, {}, ProviderUnavailableError, None),
        (409, ERROR, {}, ProviderUnavailableError, None),
        (500, ERROR, {}, ProviderUnavailableError, None),
        (503, "overloaded", {}, ProviderUnavailableError, None),
        (400, ERROR, {}, ProviderRejectedError, None),
        (400, {"error": {"code": "content_policy_violation"}}, {}, RefusedError, None),
        (401, ERROR, {}, ProviderRejectedError, None),
        (404, ERROR, {}, ProviderRejectedError, None),
        (200, completion(None, refusal="I can't help with that."), {}, RefusedError, None),
        (200, completion("", finish_reason="content_filter"), {}, RefusedError, None),
        (200, completion('{"description": "cut', finish_reason="length"), {}, BadAnswerError, None),
        (200, completion("Sure! Here is the JSON: {"), {}, BadAnswerError, None),
        (200, completion({"description": "only this"}), {}, BadAnswerError, None),
        (200, completion(METADATA | {"description": "x" * 1_000_000}), {}, BadAnswerError, None),
        (200, completion(None), {}, BadAnswerError, None),
        (200, {"error": {"message": "no"}}, {}, BadAnswerError, None),
        (200, {**completion(METADATA), "choices": []}, {}, BadAnswerError, None),
        (200, "<html>", {}, BadAnswerError, None),
    ],
)
def test_every_way_to_fail_is_one_of_our_errors_after_one_call(httpserver, vision, status, body, headers, error, wait):
    text = body if isinstance(body, str) else json.dumps(body)
    httpserver.expect_request("/v1/chat/completions").respond_with_response(
        Response(text, status, headers, content_type="application/json")
    )
    with pytest.raises(error) as caught:
        vision.describe(b"x", FACTS)
    assert type(caught.value) is error
    assert getattr(caught.value, "retry_after_seconds", None) == wait
    assert "secret" not in str(caught.value)
    assert "canary" not in str(caught.value)
    assert len(httpserver.log) == 1


def test_a_server_that_is_not_there_may_be_tried_again():
    vision = OpenAIVision("k", "http://127.0.0.1:9/v1", "m", "p")
    with pytest.raises(ProviderUnavailableError, match="did not answer"):
        vision.describe(b"x", FACTS)


def test_the_prompt_is_part_of_the_recipe():
    one, other = (OpenAIVision("k", "http://h", "m", prompt).recipe for prompt in ("a", "b"))
    assert one.settings != other.settings
    assert one.version.startswith("openai:m:prompt-")


def describe(photo):
    decoded = decode((PHOTOS / photo).read_bytes())
    return LocalVision().describe(render_preview(decoded.image), measure(decoded)).metadata


@pytest.mark.parametrize(
    ("photo", "category", "color", "mood"),
    [
        ("cat.jpg", "cat", "brown", "warm"),
        ("coffee.jpg", "food", "sienna", "warm"),
        ("galaxies.jpg", "picture", "black", "dark"),
        ("rocket.jpg", "aircraft or rocket", "navy", "cool"),
        ("astronaut.jpg", "picture", "silver", "warm"),
    ],
)
def test_the_local_model_says_what_is_there_and_nothing_it_is_unsure_of(photo, category, color, mood):
    metadata = describe(photo)
    assert metadata.category == category
    assert color in metadata.tags
    assert mood in metadata.mood
    assert ("looks like" in metadata.description) == (category != "picture")
