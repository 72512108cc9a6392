"""Text that others wrote, made fit for a terminal, a log, a mail or a page. No I/O, and nothing of ours is needed.

Control characters move the cursor, forge lines and headers; marks of direction and zero width show another text than
the one that is there; half surrogates cannot be written at all. None of them is printable in Python's sense.
"""

import json
from typing import Any


def make_printable(text: str) -> str:
    """The text on one line, with a space for each character that is not printable."""
    return (
        text if text.isprintable() else "".join(one if one.isprintable() else " " for one in text)
    )


def clean(value: Any) -> Any:
    """JSON's values with every text made printable."""
    if isinstance(value, str):
        return make_printable(value)
    if isinstance(value, list):
        return [clean(part) for part in value]
    if isinstance(value, dict):
        return {make_printable(name): clean(part) for name, part in value.items()}
    return value


def clean_error(error: BaseException) -> None:
    """Makes the texts of an error printable, and those of the errors that led to it; they may be logged anywhere."""
    seen: set[int] = set()
    rest: list[BaseException | None] = [error]
    while rest:
        one = rest.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.args = tuple(
                make_printable(part) if isinstance(part, str) else part for part in one.args
            )
            rest += [one.__cause__, one.__context__]


def to_json(value: Any, **options: Any) -> str:
    """JSON that keeps every text exactly and holds no control character: all but ASCII, and DEL, are escaped."""
    return json.dumps(value, **options).replace("\x7f", "\\u007f")
