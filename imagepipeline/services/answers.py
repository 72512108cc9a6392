"""Turns a vision model's answer into metadata.

Parses the answer leniently, cleans it and applies the vocabulary. The answer is untrusted: text in
a picture may tell the model what to write.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import inflection
from pydantic import ValidationError

from imagepipeline.errors import BadAnswerError
from imagepipeline.languages import is_english
from imagepipeline.models import MAX_ALT_CHARACTERS, ImageMetadata, Wording

T = TypeVar("T")
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
    return _read_object(
        text, lambda answer: ImageMetadata.model_validate(clean(answer, vocabulary))
    )


def read_languages(
    text: str, languages: Sequence[str], vocabulary: Vocabulary, has_colors: bool
) -> tuple[dict[str, Wording], list[str]]:
    """Returns the wording in each language, and the colours, if asked for, of a model's answer.

    The vocabulary is that of the first language.

    Raises:
        BadAnswerError: Like `read_answer`; also if a language is missing.
    """

    def read(answer: Any) -> tuple[dict[str, Wording], list[str]]:
        given = answer["languages"]
        by_tag = {tag.lower(): given[tag] for tag in given}
        wordings = {}
        for language in languages:
            allowed = vocabulary if language == languages[0] else NoVocabulary()
            wording = by_tag.get(language.lower())
            if not isinstance(wording, dict):
                raise BadAnswerError(f"the vision model's answer lacks the language {language}")
            words = _clean_words(wording, allowed, is_english(language))
            alt_text = _shorten(to_plain(_read_text(wording, "altText")))
            wordings[language] = Wording.model_validate({**words, "altText": alt_text})
        return wordings, _read_colors(answer) if has_colors else []

    return _read_object(text, read)


def _read_object(text: str, read: Callable[[Any], T]) -> T:
    if len(text) > MAX_ANSWER_CHARACTERS:
        raise BadAnswerError(f"the vision model's answer is too long: {len(text):,} characters")
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        raise BadAnswerError("the vision model's answer contains no JSON object")
    try:
        return read(json.loads(text[start : end + 1]))
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
    return {**_clean_words(answer, vocabulary), "dominantColors": _read_colors(answer)}


def _clean_words(answer: Any, vocabulary: Vocabulary, is_english: bool = True) -> dict[str, Any]:
    """Returns the fields that are words; only those of English have a known singular."""
    if not isinstance(answer, dict):
        raise BadAnswerError("the vision model's answer is not the JSON object it was asked for")
    spell = to_word if is_english else to_term
    category = spell(_read_text(answer, "category"))[:MAX_WORD_CHARACTERS].strip() or "other"
    return {
        "description": to_plain(_read_text(answer, "description")),
        "mood": to_plain(_read_text(answer, "mood"))[:MAX_WORD_CHARACTERS].strip() or "unknown",
        "tags": choose_tags(_read_list(answer, "tags"), vocabulary.tags, spell),
        "category": choose(category, vocabulary.categories, spell) or "other"
        if vocabulary.categories
        else category,
    }


def _read_colors(answer: dict[str, Any]) -> list[str]:
    colors = [
        color.lower()
        for item in _read_list(answer, "dominantColors")
        for color in COLOR.findall(item)
    ]
    return list(dict.fromkeys(colors))[:MAX_COLORS]


def _shorten(text: str) -> str:
    """Returns an alt text that is not too long; it ends with a whole word if it has any."""
    if len(text) <= MAX_ALT_CHARACTERS:
        return text
    cut = text[: MAX_ALT_CHARACTERS - 1]
    whole = cut.rpartition(" ")[0] if text[len(cut)] != " " else cut
    return (whole or cut).rstrip(" ,;:") + "…"


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
    *first, last = to_term(text).lower().split() or [""]
    if not (last.endswith(("ss", "us", "is")) or last in SINGULAR):
        last = inflection.singularize(last)
    return " ".join([*first, last]).strip()


def to_term(text: str) -> str:
    """Returns a tag or category of any language, plain; German nouns keep their capitals."""
    return to_plain(text).strip("#.,;:!?\"' ")


def choose_tags(
    tags: Iterable[str], allowed: Sequence[str], spell: Callable[[str], str] = to_word
) -> list[str]:
    """Returns the tags in normal form without duplicates.

    If `allowed` is not empty, only its tags are kept, as it spells them.
    """
    words = [spell(tag) for tag in tags]
    if allowed:
        spellings = _by_normal_form(allowed, spell)
        words = [spellings.get(word.casefold(), "") for word in words]
    return list(dict.fromkeys(word for word in words if 0 < len(word) <= MAX_WORD_CHARACTERS))[
        :MAX_TAGS
    ]


def choose(word: str, allowed: Sequence[str], spell: Callable[[str], str] = to_word) -> str | None:
    """Returns the allowed word with this normal form, as the vocabulary spells it, or None."""
    return _by_normal_form(allowed, spell).get(word.casefold())


def _by_normal_form(allowed: Sequence[str], spell: Callable[[str], str]) -> dict[str, str]:
    """Returns the words of a vocabulary by normal form; if two share one, the first wins."""
    return {spell(entry).casefold(): entry for entry in reversed(allowed)}
