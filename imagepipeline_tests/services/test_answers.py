"""A model's answer is cleaned to plain text and normalised words."""

import contextlib
import json
import time

import pytest

from imagepipeline.errors import BadAnswerError
from imagepipeline.models import CLASSIFIER_PX, ImageMetadata, PixelFacts, Wording
from imagepipeline.services import answers
from imagepipeline.services.answers import (
    MAX_ANSWER_CHARACTERS,
    choose_tags,
    read_answer,
    read_languages,
    to_plain,
    to_word,
)
from imagepipeline.services.vision import LocalVision, VisionOptions


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("A  cat\n on a\tmat", "A cat on a mat"),
        ("<script>alert(1)</script>A cat", "alert(1) A cat"),
        ("See https://evil.example/x?y=1 and www.evil.example now", "See and now"),
        ("[click](javascript:alert(1)) me", "click me"),
        ("![x](data:image/png;base64,AAAA) there", "! x there"),
        ("\u202eevil\u202c \u200bzero\x00 \x1b[31mred", "evil zero 31mred"),
        ("`rm -rf` **bold** {{template}}", "rm -rf bold template"),
        ("3 < 4 & 5 > 2", "3 2"),
        ("Café, 東京, naïve", "Café, 東京, naïve"),
    ],
)
def test_texts_lose_markup_links_and_control_characters(written, plain):
    assert to_plain(written) == plain


@pytest.mark.parametrize(
    ("written", "word"),
    [
        ("Cats", "cat"),
        ("  #Sunset. ", "sunset"),
        ("Berries", "berry"),
        ("Glass", "glass"),
        ("Bus", "bus"),
        ("Christmas", "christmas"),
        ("Canvas", "canvas"),
        ("tennis", "tennis"),
        ("wild horses", "wild horse"),
        ("people", "person"),
        ("Black & White", "black & white"),
        ("<b>Dogs</b>", "dog"),
        ("", ""),
        ("🐱", "🐱"),
    ],
)
def test_words_are_lower_case_and_singular(written, word):
    assert to_word(written) == word


def test_tags_are_unique_and_keep_their_order():
    assert choose_tags(["Cats", "dog", "cat", " Dogs ", "", "x" * 81], ()) == ["cat", "dog"]
    assert len(choose_tags([f"tag{index}" for index in range(1000)], ())) == 20


def test_tags_are_limited_to_the_vocabulary_and_its_spelling():
    assert choose_tags(["cats", "Night Sky", "spam"], ("Cat", "night skies")) == [
        "Cat",
        "night skies",
    ]


@pytest.mark.parametrize(
    "evil", ["<!---->", "](", "[](", "<", "[", "a", "aa-", "www.", "http://", "#", "e\u0301", "- "]
)
@pytest.mark.parametrize("field", ["description", "tags"])
def test_hostile_answers_are_parsed_quickly(field, evil):
    text = evil * (MAX_ANSWER_CHARACTERS // (2 * len(evil)))
    pieces = [text[start : start + 4000] for start in range(0, len(text), 4000)]
    answer = {"description": "d", "tags": ["t"], "category": "c", "dominantColors": [], "mood": "m"}
    answer |= {field: text + " a cat" if field == "description" else pieces}
    started = time.process_time()
    with contextlib.suppress(BadAnswerError):
        read_answer(json.dumps(answer, ensure_ascii=False), VisionOptions())
    assert time.process_time() - started < 0.5


HOSTILE = "<script>[x](http://evil)\x1b[31m\u202e `rm` www.evil.example"


def test_the_name_of_a_camera_is_cleaned_like_a_models_answer():
    facts = PixelFacts(
        40, 30, (("red", "#ff0000", 1.0),), 40, 0, 50, 50, camera=HOSTILE, taken_on="data:x"
    )
    metadata = LocalVision().describe(bytes(3 * CLASSIFIER_PX**2), facts).metadata
    shown = metadata.model_dump_json()
    assert "Taken with" in metadata.description
    assert not any(part in shown for part in ("<", "](", "evil", "`", "data:", "u001b", "\u202e"))


def test_the_residents_answer_is_cleaned_again():
    metadata = ImageMetadata(
        description=f"A boat {HOSTILE}",
        tags=["Boats", HOSTILE],
        category=HOSTILE,
        dominant_colors=["#AABBCC"],
        mood=HOSTILE,
    )
    cleaned = answers.clean_metadata(metadata)
    assert cleaned.description.startswith("A boat")
    assert cleaned.tags[0] == "boat"
    assert not any(
        part in cleaned.model_dump_json() for part in ("<", "](", "evil", "`", "u001b", "\u202e")
    )
    with pytest.raises(BadAnswerError):
        answers.clean_metadata(metadata.model_copy(update={"description": "<b>"}))


GERMAN = {
    "description": "Eine Katze liegt auf <b>einem</b> Sofa.",
    "altText": "Eine Katze " + "schnurrt und " * 30,
    "tags": ["Katzen", "Glas", "#Haus"],
    "category": "Tiere",
    "mood": "ruhig",
}
ENGLISH = {
    "description": "A cat on a sofa.",
    "altText": "A cat",
    "tags": "Cats, sofas, dogs",
    "category": "Animals",
    "mood": "calm",
}


def test_each_language_is_cleaned_and_bounded_by_itself():
    answer = {"languages": {"EN": ENGLISH, "de": GERMAN}, "dominantColors": ["#ABCDEF is blue"]}
    vocabulary = VisionOptions(tags=("Cat", "Sofa"), categories=("animal",))
    words, colors = read_languages(json.dumps(answer), ("en", "de"), vocabulary, True)
    assert colors == ["#abcdef"]
    assert (words["en"].tags, words["en"].category) == (["Cat", "Sofa"], "animal")
    german = words["de"]
    assert german.description == "Eine Katze liegt auf einem Sofa."
    # No language but English has plurals that we know; German nouns have capitals.
    assert (german.tags, german.category) == (["Katzen", "Glas", "Haus"], "Tiere")
    assert len(german.alt_text) <= 125
    assert german.alt_text.endswith((" und…", " schnurrt…"))
    assert len(Wording(**dict(german) | {"alt_text": "x" * 125}).alt_text) == 125


@pytest.mark.parametrize(
    ("languages", "problem"),
    [
        ({"en": ENGLISH}, "lacks the language de"),
        ({"en": ENGLISH, "de": None}, "lacks the language de"),
        ({"en": ENGLISH, "de": GERMAN | {"altText": "<br>"}}, "does not fit the schema: altText"),
        ({"en": ENGLISH, "de": GERMAN | {"altText": None}}, "altText is not a string"),
        ({"en": ENGLISH, "de": GERMAN | {"description": "x " * 1500}}, "schema: description"),
        ([ENGLISH, GERMAN], "not the JSON object it was asked for"),
        (None, "not the JSON object it was asked for"),
    ],
)
def test_an_answer_that_lacks_a_language_is_refused(languages, problem):
    answer = json.dumps({"languages": languages, "dominantColors": []})
    with pytest.raises(BadAnswerError, match=problem):
        read_languages(answer, ("en", "de"), VisionOptions(), True)


def test_colors_are_needed_where_they_are_asked_for():
    answer = json.dumps({"languages": {"en": ENGLISH}})
    assert read_languages(answer, ("en",), VisionOptions(), False)[1] == []
    with pytest.raises(BadAnswerError, match="dominantColors"):
        read_languages(answer, ("en",), VisionOptions(), True)
