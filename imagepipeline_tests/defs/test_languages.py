"""Descriptions in several languages: one call with the picture, later ones without."""

import json

import pytest
from werkzeug import Response

from imagepipeline.advice import explain_languages
from imagepipeline.models import ImageMetadata
from imagepipeline.needs import SETTINGS
from imagepipeline.providers import build_recipes, build_vision
from imagepipeline.sampling import open_sampler
from imagepipeline.settings import Settings
from imagepipeline.stores.events import EventLog
from imagepipeline.stores.plans import Outdated, Plans
from imagepipeline_tests.services.test_vision import completion


class Provider:
    """Answers in the languages that the schema asks for; notes them, and whether it saw anything.

    Each answer has other words, so that a text that is made again is noticed.
    """

    def __init__(self):
        self.asked = []

    def __call__(self, request):
        body = request.get_json()
        schema = body["response_format"]["json_schema"]["schema"]["properties"]
        languages = list(schema.get("languages", {"properties": {}})["properties"])
        kinds = [part["type"] for part in body["messages"][0]["content"]]
        self.asked.append((languages, "image_url" in kinds))
        words = {
            tag: self.describe(tag) | {"altText": f"alt text {tag} {len(self.asked)}"}
            for tag in languages
        }
        answer = {"languages": words} if languages else self.describe("en")
        answer = completion(answer | {"dominantColors": ["#7f6a55"]})
        return Response(json.dumps(answer), content_type="application/json")

    def describe(self, tag):
        return {
            "description": f"Text {tag} {len(self.asked)}",
            "tags": [f"tag {tag}"],
            "category": f"category {tag}",
            "mood": "calm",
        }


@pytest.fixture
def provider(httpserver):
    provider = Provider()
    httpserver.expect_request("/v1/chat/completions").respond_with_handler(provider)
    return provider


@pytest.fixture
def environment(monkeypatch, httpserver, tmp_path, files, redis_url, sqlite_catalogue_url):
    for name, value in {
        "IMAGEPIPELINE_HOME": tmp_path / "home",
        "IMAGEPIPELINE_STORAGE_ROOT": files.root,
        "IMAGEPIPELINE_RATE_LIMIT": "off",
        "OPENAI_BASE_URL": httpserver.url_for("/v1"),
        "DATABASE_URL": sqlite_catalogue_url,
        "REDIS_URL": redis_url,
    }.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def speak(monkeypatch, environment, run, cat, catalogue):
    """A function that processes the cat in some languages; gives its metadata."""

    def speak(languages, **options):
        monkeypatch.setenv("IMAGEPIPELINE_LANGUAGES", languages)
        assert run(cat, vision=build_vision(Settings.load()), **options).success
        return ImageMetadata.model_validate(catalogue.get(cat)["metadata"])

    return speak


def test_a_further_language_is_made_without_the_picture_and_changes_nothing_else(
    speak, provider, catalogue, index, cat, monkeypatch, sqlite_catalogue_url
):
    english = speak("en")
    assert provider.asked == [([], True)]
    assert catalogue.get(cat)["metadata"].keys() == {
        *("description", "tags", "category", "dominantColors", "mood"),
    }

    monkeypatch.setenv("IMAGEPIPELINE_LANGUAGES", "en,de")
    settings = Settings.load()
    recipes = build_recipes(settings)
    plans = Plans(sqlite_catalogue_url)
    assert plans.count_outdated(recipes) == [Outdated("metadata", SETTINGS, 1)]
    with open_sampler(settings, catalogue, recipes, print) as sampler:
        [trial] = sampler.try_images([cat])
    assert provider.asked[1:] == [(["en", "de"], False)]
    both = speak("en,de")
    assert provider.asked[2:] == []  # the sample has paid
    assert trial.described == (english, both)
    assert plans.count_outdated(recipes) == []
    assert both.model_copy(update={"languages": {}}) == english
    assert both.languages["en"].description == english.description
    assert both.languages["en"].alt_text == "alt text en 2"
    assert both.languages["de"].description == "Text de 2"
    assert "Text de 2" in index.get(cat, recipes["embedding"].version)["text"]
    payload = json.loads(EventLog(sqlite_catalogue_url).list_after()[-1].payload)
    assert payload["languages"]["de"]["altText"] == "alt text de 2"

    three = speak("en,de,fr")
    assert provider.asked[2:] == [(["fr"], False)]
    assert {tag: three.languages[tag] for tag in ("en", "de")} == both.languages
    # What is there need only be put in another order, or left out.
    german = speak("de,fr,en")
    assert (german.description, german.tags) == ("Text de 2", ["tag de"])
    assert speak("en") == english
    assert provider.asked[3:] == []

    assert speak("en,de", anew="metadata").description == "Text en 4"
    assert provider.asked[3:] == [(["en", "de"], True)]


def test_another_prompt_original_or_language_of_the_vocabulary_is_described_anew(
    speak, provider, monkeypatch, files, cat
):
    speak("en")
    monkeypatch.setenv("IMAGEPIPELINE_VISION_PROMPT", "Look.")
    speak("en,de")
    files.put_original(cat, (files.root / "original" / "cat.jpg").read_bytes() + b"0", "jpg")
    speak("de,en")
    assert provider.asked == [([], True), (["en", "de"], True), (["de", "en"], True)]
    monkeypatch.setenv("IMAGEPIPELINE_TAGS", "tag de,tag en")
    assert speak("en,de").tags == ["tag en"]
    speak("en,de,fr")
    speak("de,en")  # whose tags were not bound to the vocabulary
    assert provider.asked[3:] == [(["en", "de"], True), (["fr"], False), (["de", "en"], True)]


def test_the_offline_model_ignores_the_setting_and_says_so():
    spoken = {"IMAGEPIPELINE_LANGUAGES": "en,de"}
    offline = Settings.load(spoken)
    assert "speaks only English, so descriptions are not made in en, de" in str(
        explain_languages(offline)
    )
    assert build_recipes(offline)["metadata"] == build_recipes(Settings.load({}))["metadata"]
    assert explain_languages(Settings.load({})) is None
    assert explain_languages(Settings.load(spoken | {"OPENAI_API_KEY": "k"})) is None
