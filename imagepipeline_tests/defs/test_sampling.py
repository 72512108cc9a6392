"""A sample of a plan shows what an apply will make, changes nothing, and is paid for once."""

import hashlib
import json
from collections import Counter
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from werkzeug import Response

from imagepipeline.cli import cli
from imagepipeline.models import Upload
from imagepipeline.originals import build_originals
from imagepipeline.providers import build_embedder, build_renderer, build_vision
from imagepipeline.settings import Settings
from imagepipeline_tests.conftest import PHOTOS, count_answers
from imagepipeline_tests.services.test_embedder import answer_of
from imagepipeline_tests.services.test_vision import METADATA, completion

pytestmark = pytest.mark.stack

NAMES = ("cat", "coffee")
HOSTILE = 'A <script>alert(1)</script> cat & "dog" \' of <b>fame</b>'


class Provider:
    """Describes each picture in its own words, and counts the calls."""

    def __init__(self):
        self.calls = Counter()
        self.pictures = set()

    def __call__(self, request):
        if request.path.endswith("/embeddings"):
            self.calls["embedding"] += 1
            return self.answer(answer_of([3.0, 4.0]))
        self.calls["metadata"] += 1
        picture = hashlib.sha256(request.get_data()).hexdigest()
        self.pictures.add(picture)
        return self.answer(completion(METADATA | {"description": f"{HOSTILE} {picture[:8]}"}))

    def answer(self, content):
        return Response(json.dumps(content), content_type="application/json")


@pytest.fixture
def provider(httpserver):
    provider = Provider()
    for path in ("/v1/chat/completions", "/v1/embeddings"):
        httpserver.expect_request(path, method="POST").respond_with_handler(provider)
    return provider


@pytest.fixture
def library(run, catalogue, files):
    """Two photos that were processed offline."""
    for name in NAMES:
        files.put_original(name, (PHOTOS / f"{name}.jpg").read_bytes(), "jpg")
        catalogue.accept([Upload(name)])
        assert run(name, generation=1).success
    return NAMES


@pytest.fixture
def plan(monkeypatch, tmp_path, httpserver, library, redis_url, sqlite_catalogue_url, files):
    """A function that runs `plan` with a remote model and another quality; gives its output."""
    url = httpserver.url_for("/v1")
    for name, value in {
        "IMAGEPIPELINE_HOME": tmp_path / "home",
        "IMAGEPIPELINE_STORAGE_ROOT": files.root,
        "IMAGEPIPELINE_RATE_LIMIT": "off",
        "IMAGEPIPELINE_AVIF_QUALITY": 50,
        "DATABASE_URL": sqlite_catalogue_url,
        "REDIS_URL": redis_url,
        "OPENAI_BASE_URL": url,
        "OPENROUTER_BASE_URL": url,
    }.items():
        monkeypatch.setenv(name, str(value))
    (tmp_path / "home").mkdir()

    def plan(*arguments):
        result = CliRunner().invoke(cli, ["plan", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return plan


def read_state(catalogue, files):
    """All rows and files that a sample must not change."""
    rows = [catalogue.get(name) for name in NAMES]
    paths = sorted(path for path in files.root.rglob("*") if path.is_file())
    return rows, [(path, path.stat().st_mtime_ns) for path in paths]


def test_what_a_sample_has_paid_for_is_not_paid_again(
    plan, provider, run, catalogue, files, sqlite_catalogue_url
):
    before = read_state(catalogue, files)
    sample = json.loads(plan("--sample", "1", "--json"))
    assert read_state(catalogue, files) == before
    assert provider.calls == {"metadata": 1, "embedding": 1}
    assert sample["planned"] == 2
    [image] = sample["images"]
    assert image["now"]["metadata"]["description"] != image["new"]["metadata"]["description"]
    assert {variant["path"] for variant in image["new"]["variants"]} == {
        variant["path"] for variant in image["now"]["variants"]
    }
    each = 800 * 0.15e-6 + 60 * 0.6e-6 + 0.0001
    assert image["cost_usd"] == pytest.approx(each)
    assert sample["paid_usd"] == pytest.approx(each)
    assert sample["projected_usd"] == pytest.approx(2 * each)

    again = json.loads(plan("--sample", "1", "--json"))  # the same one, and nothing is paid
    assert again["images"] == sample["images"]
    assert (again["cost_usd"], again["paid_usd"]) == (sample["cost_usd"], 0)

    settings = Settings.load()
    for name in NAMES:
        assert run(
            name,
            vision=build_vision(settings),
            embedder=build_embedder(settings),
            renderer=build_renderer(settings),
            originals=build_originals(settings, files),
        ).success
    assert provider.calls == {"metadata": 2, "embedding": 2}
    assert len(provider.pictures) == 2  # no picture twice
    assert count_answers(sqlite_catalogue_url) == 0
    for image in sample["images"]:
        row = catalogue.get(image["image_id"])
        assert row["metadata"] == image["new"]["metadata"]
        assert {variant["path"]: variant["size"] for variant in row["variants"]} == {
            variant["path"]: variant["bytes"] for variant in image["new"]["variants"]
        }
    assert json.loads(plan("--sample", "2", "--json"))["images"] == []


class Tags(HTMLParser):
    """The elements and addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.names, self.addresses, self.texts = Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.names[tag] += 1
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def test_a_sample_is_shown_in_the_terminal_and_on_a_page_that_loads_nothing(
    plan, provider, tmp_path, files, sqlite_catalogue_url
):
    page = tmp_path / "sample.html"
    shown = plan("--sample", "1", "--seed", "7", "--where", "id=c*", "--page", str(page))
    assert "1 of 2 planned images cost 0.000256 USD" in shown
    assert "sm.avif" in shown
    assert "sm.webp" not in shown  # it stays the same
    tags = Tags(page.read_text())
    assert tags.names["section"] == 1
    assert tags.names["img"] == 3  # the picture, and one variant now and new
    assert all(address.startswith("data:image/") for address in tags.addresses)
    assert not tags.names.keys() & {"script", "b", "link", "iframe"}
    assert any('A alert(1) cat & "dog" \' of fame' in text for text in tags.texts)
    assert count_answers(sqlite_catalogue_url) == 2
    plan("--sample", "1", "--seed", "7", "--where", "id=c*", "--discard")
    assert count_answers(sqlite_catalogue_url) == 0
    assert provider.calls == {"metadata": 1, "embedding": 1}

    files.delete("original/cat.jpg")
    result = CliRunner().invoke(cli, ["plan", "--sample", "2", "--json"])
    assert result.exit_code == 1
    errors = {image["image_id"]: image["error"] for image in json.loads(result.stdout)["images"]}
    assert errors["cat"] == "there is no original/cat.* below the storage root"
    assert errors["coffee"] is None
    assert CliRunner().invoke(cli, ["plan", "--discard"]).exit_code == 2


def test_a_sample_that_fails_says_what_it_has_paid(plan, provider, httpserver, tmp_path):
    httpserver.clear()
    httpserver.expect_request("/v1/chat/completions").respond_with_handler(provider)
    httpserver.expect_request("/v1/embeddings").respond_with_data("no", 400)
    missing = str(tmp_path / "missing" / "sample.html")
    refused = CliRunner().invoke(cli, ["plan", "--sample", "1", "--page", missing])
    assert refused.exit_code == 2
    assert "is no folder that can be written to" in refused.output
    assert not provider.calls
    result = CliRunner().invoke(cli, ["plan", "--sample", "1", "--json"], catch_exceptions=False)
    assert (result.exit_code, provider.calls) == (1, {"metadata": 1})
    sample = json.loads(result.stdout)
    [image] = sample["images"]
    assert image["error"]
    assert sample["paid_usd"] == image["cost_usd"] == pytest.approx(800 * 0.15e-6 + 60 * 0.6e-6)
