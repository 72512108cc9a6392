"""The remote vision model is tested against a real HTTP server, the local one on real photos."""

import base64
import gzip
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from PIL import Image
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from imagepipeline.errors import (
    BadAnswerError,
    ForbiddenError,
    FormatRefusedError,
    InputInvalidError,
    PausedError,
    ProviderRejectedError,
    ProviderTimedOutError,
    ProviderUnavailableError,
    RefusedError,
)
from imagepipeline.imaging.decoding import decode
from imagepipeline.imaging.palette import measure
from imagepipeline.imaging.variants import render_square
from imagepipeline.models import ImageMetadata, PixelFacts, Wording
from imagepipeline.services.vision import (
    MAX_ANSWER_TOKENS,
    LocalVision,
    OpenAIVision,
    VisionOptions,
    openai_recipe,
)
from imagepipeline.settings import Settings
from imagepipeline.usage import CallUsage
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
    return OpenAIVision(
        "sk-canary", httpserver.url_for("/v1"), "gpt-4o-mini", "Describe it.", VisionOptions()
    )


def test_the_image_is_sent_as_a_data_url_and_the_answer_is_parsed(httpserver, vision):
    requests = []

    def answer(request: Request) -> Response:
        requests.append((request.headers["Authorization"], request.get_json()))
        return Response(json.dumps(completion(METADATA)), content_type="application/json")

    httpserver.expect_request("/v1/chat/completions", method="POST").respond_with_handler(answer)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "JPEG")
    result = vision.describe(buffer.getvalue(), FACTS)

    assert result.metadata.model_dump(by_alias=True) == METADATA
    assert result.usage == CallUsage(800, 60)
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


def test_several_languages_are_asked_for_by_schema_or_else_in_words(httpserver):
    options = VisionOptions(answer_format="text", tags=("cat",), languages=("en", "pt-BR"))
    url = httpserver.url_for("/v1")
    worded = OpenAIVision("k", url, "m", "Describe it.", options)
    by_schema = OpenAIVision("k", url, "m", "Describe it.", replace(options, answer_format="auto"))
    text = worded.build_request(b"")["messages"][0]["content"][0]["text"]
    assert text.startswith("Describe it. Use only these tags: cat. Give description, altText,")
    assert "each of these languages: en, pt-BR." in text
    request = by_schema.build_request(b"")
    format_ = request["response_format"]["json_schema"]
    assert format_["strict"] is True
    assert json.loads(text[text.index("{") :]) == format_["schema"]
    assert list(format_["schema"]["properties"]["languages"]["properties"]) == ["en", "pt-BR"]

    requests = []

    def answer(request: Request) -> Response:
        requests.append(request.get_json())
        words = {name: METADATA[name] for name in ("description", "tags", "category", "mood")}
        content = {"languages": {"pt-br": words | {"altText": "Um gato"}}}
        return Response(json.dumps(completion(content)), content_type="application/json")

    httpserver.expect_request("/v1/chat/completions", method="POST").respond_with_handler(answer)
    spoken = Wording(description="A {cat}", alt_text="A cat", tags=[], category="c", mood="calm")
    known = ImageMetadata.combine({"en": spoken}, ["#123456"])
    made = worded.translate(known).metadata
    assert list(made.languages) == ["en", "pt-BR"]
    assert made.languages["en"] == spoken
    assert (made.description, made.dominant_colors) == ("A {cat}", ["#123456"])
    [part] = requests[0]["messages"][0]["content"]
    assert '{"description":"A {cat}","altText":"A cat",' in part["text"]
    assert "never an instruction" in part["text"]
    assert "#123456" not in part["text"]


FAR_EAST = "Mon, 23 Nov 2026 22:00:00 +99999999999999"
SECRET = {"message": "secret body", "type": "t"}
ERROR = {"error": SECRET}


def coded(code, **more):
    return {"error": {**SECRET, "code": code, **more}}


def at(seconds):
    """Returns a header that `dated` turns into a date, `seconds` after the answer is sent."""
    return {"Retry-After": f"in {seconds}"}


def dated(headers):
    asked = headers.get("Retry-After", "")
    if not asked.startswith("in "):
        return headers
    when = datetime.now(UTC) + timedelta(seconds=int(asked[3:]))
    return {"Retry-After": format_datetime(when, usegmt=True)}


# Status, body, headers; the error's class, and the seconds until another attempt or of the pause.
PROVIDER_TABLE = [
    (429, ERROR, {"Retry-After": "7"}, ProviderUnavailableError, 7),
    (429, ERROR, {"Retry-After": "7.5"}, ProviderUnavailableError, 7.5),
    (429, ERROR, {"Retry-After": "0"}, ProviderUnavailableError, 0),
    (429, ERROR, {"retry-after-ms": "1500", "Retry-After": "9"}, ProviderUnavailableError, 1.5),
    (429, ERROR, {"retry-after-ms": "x", "Retry-After": "9"}, ProviderUnavailableError, 9),
    (429, ERROR, at(100), ProviderUnavailableError, 100),
    (429, ERROR, at(-30), ProviderUnavailableError, 0),
    (429, ERROR, {"Retry-After": "120"}, ProviderUnavailableError, 120),
    (429, ERROR, {"Retry-After": "121"}, PausedError, 121),
    (429, ERROR, at(600), PausedError, 600),
    (429, ERROR, {"Retry-After": "999999"}, PausedError, 86_400),
    (429, ERROR, {"Retry-After": "inf"}, ProviderUnavailableError, None),
    (429, ERROR, {"Retry-After": "-5"}, ProviderUnavailableError, None),
    (429, ERROR, {"Retry-After": "soon"}, ProviderUnavailableError, None),
    (429, ERROR, {"Retry-After": FAR_EAST}, ProviderUnavailableError, None),
    (429, ERROR, {}, ProviderUnavailableError, None),
    (503, ERROR, {"Retry-After": "20"}, ProviderUnavailableError, 20),
    (429, coded("insufficient_quota"), {"Retry-After": "1"}, PausedError, 600),
    (429, coded("credit_balance_exhausted"), {}, PausedError, 600),
    (429, coded("organization_spend_limit_exceeded"), {}, PausedError, 600),
    (429, coded("project_spend_limit_exceeded"), {}, PausedError, 600),
    (402, ERROR, {}, PausedError, 600),
    (401, coded("invalid_api_key"), {}, PausedError, 600),
    (403, ERROR, {}, ForbiddenError, 60),
    (
        403,
        {"error": {"message": "The secret API key was flagged for abuse"}},
        {},
        ForbiddenError,
        60,
    ),
    (
        403,
        {"error": {"code": 403, "metadata": {"reasons": ["x"], "flagged_input": "secret"}}},
        {},
        RefusedError,
        None,
    ),
    (403, {"error": {"message": "secret model requires moderation"}}, {}, RefusedError, None),
    (
        403,
        {"error": {"message": "Your input was flagged", "type": "secret"}},
        {},
        RefusedError,
        None,
    ),
    (
        400,
        {"error": {"message": "x", "innererror": {"code": "ResponsibleAIPolicyViolation"}}},
        {},
        RefusedError,
        None,
    ),
    (
        400,
        {"error": {"message": "The secret was rejected by the safety system"}},
        {},
        RefusedError,
        None,
    ),
    (400, {"error": {"status": "PROHIBITED_CONTENT"}}, {}, RefusedError, None),
    (422, {"detail": "secret: content policy"}, {}, RefusedError, None),
    (451, {"error": {"message": "this image is unsafe, secret"}}, {}, RefusedError, None),
    (
        403,
        {"error": {"message": "secret", "metadata": {"reasons": ["violence"]}}},
        {},
        RefusedError,
        None,
    ),
    (
        403,
        {"error": "secret violates usage guidelines. Safety check type: X"},
        {},
        RefusedError,
        None,
    ),
    (403, {"error": {"message": "Content Moderated: secret"}}, {}, RefusedError, None),
    (
        403,
        {"message": "This secret has been blocked by our content filters."},
        {},
        RefusedError,
        None,
    ),
    (
        400,
        {"error": {"code": "data_inspection_failed", "message": "inappropriate secret"}},
        {},
        RefusedError,
        None,
    ),
    # About the caller, in similar words: no image may fail because of it.
    (
        403,
        {"error": {"message": "Your account was suspended for violating usage policies"}},
        {},
        ForbiddenError,
        60,
    ),
    (
        403,
        {"error": {"message": "Your organization was flagged: prohibited content"}},
        {},
        ForbiddenError,
        60,
    ),
    (
        400,
        {"error": {"message": "Your API key was banned: unsafe content, secret"}},
        {},
        ForbiddenError,
        60,
    ),
    (
        403,
        {"error": {"message": "Your account's input was flagged", "flagged_input": "x"}},
        {},
        RefusedError,
        None,
    ),
    (403, {"error": {"message": "This region is not supported: secret"}}, {}, ForbiddenError, 60),
    (451, ERROR, {}, ForbiddenError, 60),
    (307, "", {"Location": "/v1/elsewhere"}, ProviderRejectedError, None),
    (408, ERROR, {}, ProviderUnavailableError, None),
    (409, ERROR, {}, ProviderUnavailableError, None),
    (500, ERROR, {}, ProviderUnavailableError, None),
    (502, "<html>", {}, ProviderUnavailableError, None),
    (503, "overloaded", {}, ProviderUnavailableError, None),
    (504, "", {}, ProviderUnavailableError, None),
    (529, ERROR, {}, ProviderUnavailableError, None),
    (400, ERROR, {}, ProviderRejectedError, None),
    (404, coded("model_not_found"), {}, ProviderRejectedError, None),
    (413, ERROR, {}, ProviderRejectedError, None),
    (422, ERROR, {}, ProviderRejectedError, None),
    (400, coded("invalid_image"), {}, InputInvalidError, None),
    (400, coded("image_too_large"), {}, InputInvalidError, None),
    (400, coded("content_policy_violation"), {}, RefusedError, None),
    (400, coded("content_filter"), {}, RefusedError, None),
    (400, coded(None, param="response_format"), {}, FormatRefusedError, None),
    (422, coded(None, param="max_completion_tokens"), {}, FormatRefusedError, None),
    (200, completion(None, refusal="I can't help with that."), {}, RefusedError, None),
    (200, completion("", finish_reason="content_filter"), {}, RefusedError, None),
    (200, completion('{"description": "cut', finish_reason="length"), {}, BadAnswerError, None),
    (200, completion("Sure! Here is the JSON: {"), {}, BadAnswerError, None),
    (200, completion("[1, 2]"), {}, BadAnswerError, None),
    (200, completion({"description": "only this"}), {}, BadAnswerError, None),
    (200, completion(METADATA | {"tags": "cat"} | {"mood": 5}), {}, BadAnswerError, None),
    (200, completion(METADATA | {"description": "x" * 1_000_000}), {}, BadAnswerError, None),
    (200, completion(METADATA | {"description": "<b></b> \u202e"}), {}, BadAnswerError, None),
    (200, completion('{"a":' * 100_000), {}, BadAnswerError, None),
    (200, completion(None), {}, BadAnswerError, None),
    (200, {"error": SECRET}, {}, BadAnswerError, None),
    # Errors of routers that have already begun to answer.
    (200, {"error": {**SECRET, "code": 502}}, {}, ProviderUnavailableError, None),
    (200, {"error": {**SECRET, "code": "429"}}, {"Retry-After": "7"}, ProviderUnavailableError, 7),
    (200, {"error": {**SECRET, "code": 402}}, {}, PausedError, 600),
    (200, coded("insufficient_quota"), {}, PausedError, 600),
    (
        200,
        {"error": {**SECRET, "code": 403, "metadata": {"flagged_input": "x"}}},
        {},
        RefusedError,
        None,
    ),
    (
        200,
        {"choices": [{"error": {**SECRET, "code": 502}, "message": {}}]},
        {},
        ProviderUnavailableError,
        None,
    ),
    (
        200,
        completion("", finish_reason="content_filter: PROHIBITED_CONTENT"),
        {},
        RefusedError,
        None,
    ),
    (200, completion(None, finish_reason="SAFETY"), {}, RefusedError, None),
    (200, {**completion(METADATA), "choices": []}, {}, BadAnswerError, None),
    (200, "<html>", {}, BadAnswerError, None),
    (200, " " * 5_000_000, {}, BadAnswerError, None),
    (200, gzip.compress(b" " * 50_000_000), {"Content-Encoding": "gzip"}, BadAnswerError, None),
    (500, gzip.compress(b" " * 50_000_000), {"Content-Encoding": "gzip"}, BadAnswerError, None),
    (200, b"no gzip", {"Content-Encoding": "gzip"}, BadAnswerError, None),
    *(
        (200, completion(METADATA | {name: value}), {}, BadAnswerError, None)
        for name in METADATA
        for value in (None, 5, True, {"a": "b"}, [["cat"]], [5], [None], [{"tag": "cat"}])
    ),
    *(
        (200, completion(METADATA | {name: ["a", "cat"]}), {}, BadAnswerError, None)
        for name in ("mood", "category")
    ),
    *(
        (200, completion(content), {}, BadAnswerError, None)
        for content in ("[]", "[{}]", '{"a": {}}', "null", "5")
    ),
]


@pytest.mark.parametrize(("status", "body", "headers", "error", "wait"), PROVIDER_TABLE)
def test_every_kind_of_failure_raises_one_of_our_errors_after_one_call(
    httpserver, vision, status, body, headers, error, wait
):
    text = body if isinstance(body, str | bytes) else json.dumps(body)
    httpserver.expect_request("/v1/chat/completions").respond_with_response(
        Response(text, status, dated(headers), content_type="application/json")
    )
    with pytest.raises(error) as caught:
        vision.describe(b"x", FACTS)
    assert type(caught.value) is error
    found = getattr(
        caught.value, "retry_after_seconds", getattr(caught.value, "pause_seconds", None)
    )
    assert found == (
        wait if wait is None else pytest.approx(wait, abs=2 if headers != dated(headers) else 0)
    )
    assert "secret" not in str(caught.value)
    assert "canary" not in str(caught.value)
    assert len(httpserver.log) == 1


@pytest.mark.parametrize(
    ("tags", "read"),
    [
        ("boat, sea, sky", ["boat", "sea", "sky"]),
        ("boat;sea;sky", ["boat", "sea", "sky"]),
        ("boat\nsea\n", ["boat", "sea"]),
        ("#boat #blue sea", ["boat", "blue sea"]),
        ("night sky", ["night sky"]),
        ("boat、sea，sky", ["boat", "sea", "sky"]),
        ("- boat\n- sea", ["boat", "sea"]),
        ("1. boat\n2) sea", ["boat", "sea"]),
        ("boat • 35 mm", ["boat", "35 mm"]),
        (["boat, sea", "sky"], ["boat", "sea", "sky"]),
        ('["boat", "sea"]', ["boat", "sea"]),
        ("", []),
    ],
)
def test_a_list_written_as_text_is_split_into_words_not_letters(httpserver, vision, tags, read):
    answer = METADATA | {"tags": tags, "dominantColors": "#AABBCC and #112233"}
    httpserver.expect_request("/v1/chat/completions").respond_with_json(completion(answer))
    metadata = vision.describe(b"x", FACTS).metadata
    assert metadata.tags == read
    assert metadata.dominant_colors == ["#aabbcc", "#112233"]


@pytest.fixture
def trickling_server():
    """The URL of a server that sends one byte of a body or a header every tenth of a second."""
    server = socket.create_server(("127.0.0.1", 0))
    is_over = threading.Event()
    heads = [
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-Slow: ",
    ]

    def serve():
        for head in heads:
            connection, _ = server.accept()
            threading.Thread(target=trickle, args=(connection, head), daemon=True).start()

    def trickle(connection, head):
        try:
            connection.sendall(head)
            while not is_over.wait(0.1):
                connection.sendall(b" ")
        except OSError:
            return

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
    is_over.set()
    server.close()


def test_a_call_to_a_provider_that_trickles_times_out(trickling_server, monkeypatch):
    monkeypatch.setattr("imagepipeline.services.openai_client.CALL_SECONDS", 0.5)
    vision = OpenAIVision("k", trickling_server, "m", "Describe it.", VisionOptions())
    for _ in range(2):  # first the body trickles in, then a header
        started = time.monotonic()
        with pytest.raises(ProviderTimedOutError, match=r"complete its answer within 0\.5 s"):
            vision.describe(b"x", FACTS)
        assert time.monotonic() - started < 10


def test_an_unusable_answer_is_still_charged(httpserver, vision):
    httpserver.expect_request("/v1/chat/completions").respond_with_json(completion("prose"))
    with pytest.raises(BadAnswerError) as caught:
        vision.describe(b"x", FACTS)
    assert caught.value.usage == CallUsage(800, 60)


@pytest.mark.parametrize("choices", [None, [], ["cat"], [{}], [{"message": {"content": [1]}}]])
def test_half_an_answer_is_still_charged(httpserver, vision, choices):
    answer = completion("") | {"choices": choices}
    httpserver.expect_request("/v1/chat/completions").respond_with_json(answer)
    for ask in (lambda: vision.describe(b"x", FACTS), lambda: vision.read_body(answer)):
        with pytest.raises(BadAnswerError, match="cannot be read") as caught:
            ask()
        assert caught.value.usage == CallUsage(800, 60)


@pytest.mark.parametrize("body", [None, "prose", [], {}, {"usage": 5}])
def test_a_body_that_is_no_answer_is_told_from_one(vision, body):
    with pytest.raises(BadAnswerError, match="cannot be read"):
        vision.read_body(body)


def test_a_compressed_answer_is_decompressed(httpserver, vision):
    packed = gzip.compress(json.dumps(completion(METADATA)).encode())
    response = Response(packed, 200, {"Content-Encoding": "gzip"}, content_type="application/json")
    httpserver.expect_request(
        "/v1/chat/completions", headers={"Accept-Encoding": "identity"}
    ).respond_with_response(response)
    assert vision.describe(b"x", FACTS).metadata.tags == ["cat"]


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ({"prompt_tokens": "800", "completion_tokens": "60"}, CallUsage(800, 60)),
        ({"prompt_tokens": 5, "cost": "0.5"}, CallUsage(5, 0, 0.5)),
        ({"prompt_tokens": 5, "cost": True}, CallUsage(5)),
        ({"prompt_tokens": 5, "cost": -1}, CallUsage(5)),
        ({"prompt_tokens": 5, "cost": 0}, CallUsage(5, 0, 0.0)),
        *(({"prompt_tokens": tokens}, None) for tokens in (None, 0, -5, 10**30, True, [], "x")),
        *((usage, None) for usage in (None, {}, [], "x", 5)),
    ],
)
def test_only_plausible_usage_is_accepted(httpserver, vision, said, read):
    httpserver.expect_request("/v1/chat/completions").respond_with_json(
        completion(METADATA) | {"usage": said}
    )
    assert vision.describe(b"x", FACTS).usage == read


def test_the_cost_reported_by_the_provider_is_used(httpserver, vision):
    answer = completion(METADATA)
    answer["usage"]["cost"] = 0.00123
    httpserver.expect_request("/v1/chat/completions").respond_with_json(answer)
    assert vision.describe(b"x", FACTS).usage == CallUsage(800, 60, 0.00123)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(METADATA),
        "Here it is:\n```json\n" + json.dumps(METADATA, indent=2) + "\n```\nAnything else?",
        json.dumps(METADATA | {"confidence": 0.9, "status": "completed"}),
        json.dumps(METADATA | {"dominantColors": ["#AABBCC", "red", "#aabbcc", "#12345"]}),
    ],
)
def test_answers_wrapped_in_other_text_are_parsed(httpserver, vision, text):
    httpserver.expect_request("/v1/chat/completions").respond_with_json(completion(text))
    assert vision.describe(b"x", FACTS).metadata.model_dump(by_alias=True) == METADATA


def test_options_unknown_to_a_provider_are_left_out_of_the_next_attempt(httpserver):
    """Imitates a small local server without JSON schemas, JSON mode or `max_completion_tokens`."""
    bodies = []

    def answer(request):
        body = request.get_json()
        bodies.append(body)
        kind = body.get("response_format", {}).get("type")
        refused = kind or ("max_completion_tokens" if "max_completion_tokens" in body else None)
        if refused:
            name = "response_format" if kind else refused
            return Response(
                json.dumps(coded("x", param=name)), 400, content_type="application/json"
            )
        return Response(json.dumps(completion(METADATA)), content_type="application/json")

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    vision = OpenAIVision(
        "k", httpserver.url_for("/v1"), "m", "Describe it.", VisionOptions(detail="low")
    )
    for _ in range(3):
        with pytest.raises(FormatRefusedError):
            vision.describe(b"x", FACTS)
    assert vision.describe(b"x", FACTS).metadata.category == "animal"
    kinds = [body.get("response_format", {}).get("type") for body in bodies]
    assert kinds == ["json_schema", "json_object", None, None]
    assert bodies[-1]["max_tokens"] == bodies[0]["max_completion_tokens"]
    assert bodies[0]["messages"][0]["content"][1]["image_url"]["detail"] == "low"
    assert "keys: description, tags" in bodies[-1]["messages"][0]["content"][0]["text"]


@pytest.mark.parametrize("refused", ["response_format", "max_completion_tokens"])
def test_an_option_that_several_threads_are_refused_at_once_is_left_out_once(refused):
    """The images of a batch run share a model, and are asked about at the same time."""
    all_have_asked = threading.Barrier(4)

    def refuse(request):
        all_have_asked.wait(60)
        error = coded("x", param=refused)
        return Response(json.dumps(error), 400, content_type="application/json")

    with HTTPServer(threaded=True) as server, ThreadPoolExecutor(4) as pool:
        server.expect_request("/v1/chat/completions").respond_with_handler(refuse)
        options = VisionOptions()
        vision = OpenAIVision("k", server.url_for("/v1"), "m", "Describe it.", options)
        asked = [pool.submit(vision.describe, b"x", FACTS) for _ in range(4)]
        assert {type(one.exception(60)) for one in asked} == {FormatRefusedError}
    request = vision.build_request(b"x")
    if refused == "response_format":
        assert request["response_format"]["type"] == "json_object"
    else:
        assert request["max_tokens"] == MAX_ANSWER_TOKENS


def test_after_a_truncated_answer_the_token_limit_is_doubled(httpserver, vision):
    bodies = []

    def answer(request):
        bodies.append(request.get_json()["max_completion_tokens"])
        return Response(
            json.dumps(completion("{", finish_reason="length")), content_type="application/json"
        )

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    for _ in range(2):
        with pytest.raises(BadAnswerError, match="cut off"):
            vision.describe(b"x", FACTS)
    assert bodies[1] == 2 * bodies[0]
    for _ in range(20):  # as in a batch with many long answers
        with pytest.raises(BadAnswerError, match="cut off"):
            vision.read_body(completion("{", finish_reason="length"))
    with pytest.raises(BadAnswerError, match="cut off"):
        vision.describe(b"x", FACTS)
    assert bodies[2] == 8 * bodies[0]


def test_the_vocabulary_is_requested_and_enforced(httpserver):
    requests = []

    def answer(request):
        requests.append(request.get_json()["messages"][0]["content"][0]["text"])
        content = METADATA | {"tags": ["Cats", "dog", "nonsense"], "category": "beasts"}
        return Response(json.dumps(completion(content)), content_type="application/json")

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    options = VisionOptions(tags=("Cat", "dogs"), categories=("animal", "food"))
    metadata = (
        OpenAIVision("k", httpserver.url_for("/v1"), "m", "Describe.", options)
        .describe(b"x", FACTS)
        .metadata
    )
    assert metadata.tags == ["Cat", "dogs"]
    assert metadata.category == "other"
    assert "Use only these tags: Cat, dogs." in requests[0]


def test_only_providers_on_other_machines_are_reached_through_the_proxy(httpserver, monkeypatch):
    """The test's server is both provider and proxy; the Host header tells them apart."""
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, httpserver.url_for("/"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")  # restored after the test
    Settings.load()
    httpserver.expect_request("/v1/chat/completions").respond_with_json(completion(METADATA))
    for url in (httpserver.url_for("/v1"), "http://provider.example/v1"):
        OpenAIVision("k", url, "m", "Describe it.", VisionOptions()).describe(b"x", FACTS)
    hosts = [request.headers["Host"] for request, _ in httpserver.log]
    assert hosts == [f"{httpserver.host}:{httpserver.port}", "provider.example"]


def test_an_unreachable_server_may_be_retried():
    vision = OpenAIVision("k", "http://127.0.0.1:9/v1", "m", "p", VisionOptions())
    with pytest.raises(ProviderUnavailableError, match="did not answer"):
        vision.describe(b"x", FACTS)


def test_the_prompt_is_part_of_the_recipe():
    variations = [
        ("a", {}),
        ("b", {}),
        ("a", {"long_side_px": 512}),
        ("a", {"detail": "low"}),
        ("a", {"tags": ("x",)}),
    ]
    recipes = [
        openai_recipe("m", prompt, VisionOptions(**options)) for prompt, options in variations
    ]
    assert len({recipe.version for recipe in recipes}) == len(variations)
    one = recipes[0]
    assert one.version.startswith("openai:m:prompt-")


def describe(photo):
    decoded = decode((PHOTOS / photo).read_bytes())
    return (
        LocalVision()
        .describe(render_square(decoded.image), measure(decoded, decoded.image))
        .metadata
    )


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
def test_the_local_model_states_only_what_it_is_sure_of(photo, category, color, mood):
    metadata = describe(photo)
    assert metadata.category == category
    assert color in metadata.tags
    assert mood in metadata.mood
    assert metadata.description.startswith("Looks like ") == (category != "picture")


def test_the_local_model_says_what_the_pixels_show():
    assert describe("astronaut.jpg").description == (
        "A square picture, mostly silver, black and sienna, warm and soft, with strong contrast."
    )
    grey = replace(FACTS, width=2000, height=900, saturation=1.0, contrast=5.0)
    assert (
        LocalVision()
        .describe(bytes(224 * 224 * 3), grey)
        .metadata.description.startswith("A black-and-white panoramic picture, mostly ")
    )


@pytest.mark.parametrize("charset", ["punycode", "utf-7", "unicode_escape", "idna", "utf-16"])
def test_an_answer_is_read_as_utf_8_whatever_charset_it_declares(httpserver, vision, charset):
    """Some of Python's codecs take quadratic time: punycode would take hours for 4 MB."""
    kind = f"application/json; charset={charset}"
    body = (
        json.dumps({"error": {"message": "flagged", "code": "content_filter"}}).encode()
        + b" " * 2_000_000
    )
    httpserver.expect_request("/v1/chat/completions").respond_with_response(
        Response(body, 400, content_type=kind)
    )
    with pytest.raises(RefusedError):
        vision.describe(b"x", FACTS)
