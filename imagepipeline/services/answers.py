"""From what a vision model wrote to metadata: parsed with patience, cleaned, put into the words of the vocabulary.

The answer is untrusted: a picture may hold text that tells the model what to write.
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
# Far above any honest answer. What is longer is refused, or cut, before an expression or a parser looks at it.
MAX_ANSWER_CHARACTERS, MAX_TEXT_CHARACTERS, MAX_ITEMS = 100_000, 4_000, 200
# Some models write a list as text: with commas of any script, a bullet or number a line, or a hash before each tag.
SEPARATOR = re.compile(r"[,;\n|•·،、，；]|\s(?=#)")
BULLET = re.compile(r"\s*(?:[-*–]|\d{1,2}[.)])\s+")
COLOR = re.compile(r"#[0-9a-fA-F]{6}\b")
# Links, then markup; what a template or a chat window might act upon. Their time is linear.
LINK = re.compile(
    r"\]\((?:(?!\]\()[^)])*\)+|(?:\b[a-z][a-z0-9+.-]{1,20}://|\bwww\.|\bmailto:|\bjavascript:|\bdata:)\S*",
    re.IGNORECASE,
)
MARKUP = re.compile(r"<[^<>]*>|[<>`{}\[\]|\\]|\*\*|\]\(")
# Singular words that end like plurals; those in -ss, -us, -is are told by their ending.
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
    """The words an answer must keep to; empty for any."""

    @property
    def tags(self) -> tuple[str, ...]:
        """The allowed tags."""

    @property
    def categories(self) -> tuple[str, ...]:
        """The allowed categories."""


class AnyWords:
    """No vocabulary."""

    tags: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()


def read_answer(text: str, vocabulary: Vocabulary) -> ImageMetadata:
    """The metadata in a model's answer, which may be wrapped in prose or a code fence.

    Raises:
        BadAnswerError: there is no such object in it, or it does not fit the schema; the message quotes nothing.
    """
    if len(text) > MAX_ANSWER_CHARACTERS:
        raise BadAnswerError(f"the vision model's answer has {len(text):,} characters")
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        raise BadAnswerError("the vision model's answer holds no JSON object")
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
    """The fields asked for, and no others: without markup, links and control characters, the words normalised.

    Raises:
        BadAnswerError: a field is missing or of the wrong type.
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
    """Metadata from a process that is not trusted, cleaned as a model's answer is.

    Raises:
        BadAnswerError: nothing is left of it.
    """
    try:
        return ImageMetadata.model_validate(clean(metadata.model_dump(by_alias=True), AnyWords()))
    except ValidationError:
        raise BadAnswerError("the local model's answer is empty") from None


def _read_text(answer: dict[str, Any], name: str) -> str:
    value = answer.get(name)
    if not isinstance(value, str):
        raise BadAnswerError(
            f"the vision model's answer does not fit the schema: {name} is no text"
        )
    return value


def _read_list(answer: dict[str, Any], name: str) -> list[str]:
    """The texts of a list, each of which may be a list written as text; or of a text that is one."""
    value = answer.get(name)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadAnswerError(
            f"the vision model's answer does not fit the schema: {name} is no list of texts"
        )
    items = [
        item for text in texts[:MAX_ITEMS] for item in SEPARATOR.split(text[:MAX_TEXT_CHARACTERS])
    ]
    return [_without_bullet(item) for item in items[:MAX_ITEMS]]


def _without_bullet(item: str) -> str:
    bullet = BULLET.match(item)
    return item[bullet.end() if bullet else 0 :].strip()


def to_plain(text: str) -> str:
    """The text on one line: no markup, no links, no control or direction characters; what is far too long is cut."""
    text = unicodedata.normalize("NFC", text[:MAX_TEXT_CHARACTERS])
    text = MARKUP.sub(" ", LINK.sub(" ", text))
    text = "".join(
        " " if unicodedata.category(character)[0] in "CZ" else character for character in text
    )
    return " ".join(text.split())


def to_word(text: str) -> str:
    """A tag or category in its normal form: plain, lower case, its last word singular."""
    *first, last = to_plain(text).lower().strip("#.,;:!?\"' ").split() or [""]
    if not (last.endswith(("ss", "us", "is")) or last in SINGULAR):
        last = inflection.singularize(last)
    return " ".join([*first, last]).strip()


def choose_tags(tags: Iterable[str], allowed: Sequence[str]) -> list[str]:
    """The tags in normal form, each once, those of the vocabulary if there is one."""
    words = [to_word(tag) for tag in tags]
    if allowed:
        meant = _by_normal_form(allowed)
        words = [meant.get(word, "") for word in words]
    return list(dict.fromkeys(word for word in words if 0 < len(word) <= MAX_WORD_CHARACTERS))[
        :MAX_TAGS
    ]


def choose(word: str, allowed: Sequence[str]) -> str | None:
    """The word of the vocabulary that a word in normal form means, as the vocabulary spells it."""
    return _by_normal_form(allowed).get(word)


def _by_normal_form(allowed: Sequence[str]) -> dict[str, str]:
    """The words of a vocabulary by what they are compared as; of two that are the same, the first counts."""
    return {to_word(entry): entry for entry in reversed(allowed)}
