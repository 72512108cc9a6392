"""Makes untrusted text safe for a terminal, a log, a mail or a web page.

Control characters can move the cursor and forge lines or headers. Bidirectional and zero-width
characters can make a text look like another one. Lone surrogates cannot be encoded at all. Python's
`str.isprintable` rejects all of them.

This module does no I/O and depends on no other module of the package.
"""

import hashlib
import json
from typing import Any


def hash_text(text: str) -> str:
    """Returns the SHA-256 of a text, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def make_printable(text: str) -> str:
    """Returns the text on one line, with each unprintable character replaced by a space."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else " " for character in text)


def clean(value: Any) -> Any:
    """Returns a JSON value with all strings, including keys, made printable."""
    if isinstance(value, str):
        return make_printable(value)
    if isinstance(value, list):
        return [clean(part) for part in value]
    if isinstance(value, dict):
        return {make_printable(name): clean(part) for name, part in value.items()}
    return value


def clean_error(error: BaseException) -> None:
    """Makes the messages of an error, its causes and its contexts printable."""
    seen: set[int] = set()
    rest: list[BaseException | None] = [error]
    while rest:
        current = rest.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            current.args = tuple(
                make_printable(part) if isinstance(part, str) else part for part in current.args
            )
            rest += [current.__cause__, current.__context__]


def to_json(value: Any, **options: Any) -> str:
    """Returns JSON without control characters: DEL and everything beyond ASCII are escaped.

    Parsing it gives back every text exactly.
    """
    return json.dumps(value, **options).replace("\x7f", "\\u007f")
