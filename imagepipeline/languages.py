"""Languages of descriptions, as BCP 47 tags: `de`, `pt-BR`, `zh-Hant`."""

import re

DEFAULT = ("en",)
MAX_LANGUAGES = 8  # each lengthens every answer, and the text that is embedded
TAG = re.compile(r"([a-z]{2,3})(-[a-z]{4})?(-(?:[a-z]{2}|[0-9]{3}))?", re.IGNORECASE | re.ASCII)
# ISO 639-1: a two-letter code that is none is most likely a country's, such as `jp`.
TWO_LETTERS = (
    "aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da "
    "de dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy "
    "hz ia id ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg "
    "li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or "
    "os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta "
    "te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)


def parse_languages(tags: tuple[str, ...]) -> tuple[str, ...]:
    """The tags in their usual spelling; the default language if there are none.

    Raises:
        ValueError: one is no language, or there are too many; the message says which.
    """
    spelt = tuple(map(_spell, tags))
    if len(spelt) > MAX_LANGUAGES:
        raise ValueError(f"must be at most {MAX_LANGUAGES} languages")
    if len(set(spelt)) < len(spelt):
        raise ValueError("must name each language once")
    return spelt or DEFAULT


def is_english(tag: str) -> bool:
    """Whether it is a kind of English."""
    return tag.partition("-")[0] == "en"


def _spell(tag: str) -> str:
    found = TAG.fullmatch(tag)
    if not found or (len(found[1]) == 2 and found[1].lower() not in TWO_LETTERS.split()):
        raise ValueError(
            f"{tag!r:.40} is no language: use BCP 47 tags such as en, de, ja, pt-BR or zh-Hant"
        )
    language, script, region = found.groups(default="")
    return language.lower() + script.title() + region.upper()
