"""Turns a vision model's answer into metadata.

Parses the answer leniently, cleans it and applies the vocabulary. The answer is untrusted: text in
a picture may tell the model what to write.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import inflection
from pydantic import ValidationError

from imagepipeline.errors import BadAnswerError
from imagepipeline.models import ImageMetadata

MAX_TAGS, MAX_COLORS, MAX_WORD_CHARACTERS = 20, 8, 80
# Far above any genuine answer. Longer input is refused or cut before a regex or parser sees it.
MAX_ANSWER_CHARACTERS, MAX_TEXT_CHARACTERS, MAX_ITEMS = 100_000, 4_000, 200
# Some models write a list as text: separated by commas of any script, as bulleted or numbered
# lines, or as hashtags.
SEPARATOR = re.compile(r"[,;\n|•·،、，；]|\s(?=#)")
BULLET = re.compile(r"\s*(?:[-*–]|\d{1,2}[.)])\s+")
COLOR = re.compile(r"#[0-9a-fA-F]{6}\b")
# Links and markup that a template or a chat window might interpret. Both run in linear time.
LINK = re.compile(
    r"\]\((?:(?!\]\()[^)])*\)+"
    r"|(?:\b[a-z][a-z0-9+.-]{1,20}://|\bwww\.|\bmailto:|\bjavascript:|\bdata:)\S*",
    re.IGNORECASE,
)
MARKUP = re.compile(r"<[^<>]*>|[<>`{}\[\]|\\]|\*\*|\]\(")
# Singular words that end like plurals. Those in -ss, -us and -is are recognised by their ending.
SINGULAR = frozenset(
    {
        "christmas",
        "canvas",
        "gas",
        "atlas",
        "bias",
        "texas",
        "lens",
        "mars",
        "series",
        "species",
        "news",
    }
)


class Vocabulary(Protocol):
    """The words that an answer may use; empty if any are allowed."""

    @property
    def tags(self) -> tuple[str, ...]:
        """The allowed tags."""

    @property
    def categories(self) -> tuple[str, ...]:
        """The allowed categories."""


class NoVocabulary:
    """A vocabulary that allows any words."""

    tags: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()


def read_answer(text: str, vocabulary: Vocabulary) -> ImageMetadata:
    """Returns the metadata in a model's answer, which may be wrapped in prose or a code fence.

    Raises:
        BadAnswerError: The answer contains no JSON object, or the object does not fit the schema.
            The message quotes nothing of the answer.
    """
    if len(text) > MAX_ANSWER_CHARACTERS:
        raise BadAnswerError(f"the vision model's answer is too long: {len(text):,} characters")
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        raise BadAnswerError("the vision model's answer contains no JSON object")
    try:
        answer = json.loads(text[start : end + 1])
        return ImageMetadata.model_validate(clean(answer, vocabulary))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise BadAnswerError(
                "the vision model's answer is not the JSON object it was asked for"
            ) from None
        places = ", ".join(
            sorted(
                {str(problem["loc"][0]) if problem["loc"] else "it" for problem in error.errors()}
            )
        )
        raise BadAnswerError(
            f"the vision model's answer does not fit the schema: {places[:80]}"
        ) from None


def clean(answer: Any, vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns only the requested fields, with normalised words.

    Markup, links and control characters are removed.

    Raises:
        BadAnswerError: A field is missing or has the wrong type.
    """
    if not isinstance(answer, dict):
        raise BadAnswerError("the vision model's answer is not the JSON object it was asked for")
    category = to_word(_read_text(answer, "category"))[:MAX_WORD_CHARACTERS].strip() or "other"
    colors = [
        color.lower()
        for item in _read_list(answer, "dominantColors")
        for color in COLOR.findall(item)
    ]
    return {
        "description": to_plain(_read_text(answer, "description")),
        "mood": to_plain(_read_text(answer, "mood"))[:MAX_WORD_CHARACTERS].strip() or "unknown",
        "tags": choose_tags(_read_list(answer, "tags"), vocabulary.tags),
        "category": choose(category, vocabulary.categories) or "other"
        if vocabulary.categories
        else category,
        "dominantColors": list(dict.fromkeys(colors))[:MAX_COLORS],
    }


def clean_metadata(metadata: ImageMetadata) -> ImageMetadata:
    """Cleans metadata from an untrusted process in the same way as a model's answer.

    Raises:
        BadAnswerError: A field is empty after cleaning.
    """
    try:
        return ImageMetadata.model_validate(
            clean(metadata.model_dump(by_alias=True), NoVocabulary())
        )
    except ValidationError:
        raise BadAnswerError("the local model's answer is empty") from None


def _read_text(answer: dict[str, Any], name: str) -> str:
    value = answer.get(name)
    if not isinstance(value, str):
        raise BadAnswerError(
            f"the vision model's answer does not fit the schema: {name} is not a string"
        )
    return value


def _read_list(answer: dict[str, Any], name: str) -> list[str]:
    """Returns the items of a list field.

    The field may be a list or a string, and each string may itself contain a written list.
    """
    value = answer.get(name)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadAnswerError(
            f"the vision model's answer does not fit the schema: {name} is not a list of strings"
        )
    items = [
        item for text in texts[:MAX_ITEMS] for item in SEPARATOR.split(text[:MAX_TEXT_CHARACTERS])
    ]
    return [_without_bullet(item) for item in items[:MAX_ITEMS]]


def _without_bullet(item: str) -> str:
    bullet = BULLET.match(item)
    return item[bullet.end() if bullet else 0 :].strip()


def to_plain(text: str) -> str:
    """Returns the text on one line, without markup, links, and control or bidirectional characters.

    Far too long texts are cut.
    """
    text = unicodedata.normalize("NFC", text[:MAX_TEXT_CHARACTERS])
    text = MARKUP.sub(" ", LINK.sub(" ", text))
    text = "".join(
        " " if unicodedata.category(character)[0] in "CZ" else character for character in text
    )
    return " ".join(text.split())


def to_word(text: str) -> str:
    """Returns a tag or category in normal form: plain, lower case, with its last word singular."""
    *first, last = to_plain(text).lower().strip("#.,;:!?\"' ").split() or [""]
    if not (last.endswith(("ss", "us", "is")) or last in SINGULAR):
        last = inflection.singularize(last)
    return " ".join([*first, last]).strip()


def choose_tags(tags: Iterable[str], allowed: Sequence[str]) -> list[str]:
    """Returns the tags in normal form without duplicates.

    If `allowed` is not empty, only its tags are kept, as it spells them.
    """
    words = [to_word(tag) for tag in tags]
    if allowed:
        spellings = _by_normal_form(allowed)
        words = [spellings.get(word, "") for word in words]
    return list(dict.fromkeys(word for word in words if 0 < len(word) <= MAX_WORD_CHARACTERS))[
        :MAX_TAGS
    ]


def choose(word: str, allowed: Sequence[str]) -> str | None:
    """Returns the allowed word with this normal form, as the vocabulary spells it, or None."""
    return _by_normal_form(allowed).get(word)


def _by_normal_form(allowed: Sequence[str]) -> dict[str, str]:
    """Returns the words of a vocabulary by normal form; if two share one, the first wins."""
    return {to_word(entry): entry for entry in reversed(allowed)}
