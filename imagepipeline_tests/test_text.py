"""Texts by others cannot affect a terminal, log, header or page, and take linear time to parse."""

import contextlib
import json
import time
from pathlib import Path

import pytest

from imagepipeline import cli, commands, console, display
from imagepipeline.errors import (
    BadAnswerError,
    ImagePipelineError,
    MissingOriginalError,
    StackError,
)
from imagepipeline.models import Upload
from imagepipeline.prices import DATE
from imagepipeline.services import answers, openai_client
from imagepipeline.text import clean, clean_error, make_printable, to_json

EVIL = {
    "C0": "\x07\b\r\v\x1b[2J\x1b]0;title\x07",
    "lines": "a\nforged\u2028line\u2029\x85",
    "C1": "\x9b31m\x90",
    "DEL": "\x7f",
    "bidi": "\u202egpj.exe\u2066\u200f",
    "zero width": "\u200b\u200d\ufeff\u00ad",
    "tags": "\U000e0041",
    "half a surrogate": "\ud83d",
}


@pytest.mark.parametrize("text", EVIL.values(), ids=EVIL)
def test_texts_become_printable(text):
    assert make_printable(f"a{text}b").isprintable()
    assert len(make_printable(text)) == len(text)
    assert str(ImagePipelineError(f"no {text}")).isprintable()
    assert clean({text: [text, 1, None]}) == {make_printable(text): [make_printable(text), 1, None]}


@pytest.mark.parametrize("text", EVIL.values(), ids=EVIL)
def test_json_keeps_the_exact_text_without_control_characters(text):
    shown = to_json({"text": text})
    assert shown.isascii()
    assert shown.isprintable()
    assert json.loads(shown) == {"text": text}


def test_words_of_all_scripts_are_unchanged():
    text = "Größe, 東京, العربية, हिन्दी, 🦊, e\u0301"
    assert make_printable(text) == text


def test_a_log_excerpt_keeps_line_breaks_but_no_control_characters():
    assert (
        str(StackError("it did not start:\n\x1b[31mred\nlast"))
        == "it did not start:\n [31mred\nlast"
    )


def test_an_error_is_cleaned_together_with_its_causes():
    cause, error = ValueError("\x1b[31m", 7), MissingOriginalError("\x1b[32m")
    error.__cause__, cause.__context__ = cause, error
    clean_error(error)
    assert (error.args, cause.args) == ((" [32m",), (" [31m", 7))


@pytest.mark.parametrize(
    "path",
    [*Path(commands.__path__[0]).glob("*.py"), cli.__file__, console.__file__, display.__file__],
    ids=lambda path: Path(path).name,
)
def test_the_command_line_prints_cleaned_texts_only(path):
    source = Path(path).read_text()
    assert source.count("click.echo(") == (1 if Path(path).name == "shared.py" else 0)
    assert "json.dumps(" not in source
    assert "escape(" not in source


def seconds(work):
    """Returns the least CPU time of three tries."""
    times = []
    for _ in range(3):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


SHORT, LONG = 2_000, 16_000
PATTERNS = {
    "policy": openai_client.POLICY_TEXT.search,
    "caller": openai_client.CALLER_TEXT.search,
    "picture": openai_client.INPUT_VERDICT_TEXT.search,
    "separator": answers.SEPARATOR.split,
    "bullet": answers.BULLET.match,
    "color": answers.COLOR.findall,
    "link": answers.LINK.sub,
    "markup": answers.MARKUP.sub,
    "date": DATE.sub,
    "id": lambda text: Upload.from_entry(text[:4000].encode()),
}
ATTACKS = [
    *("<!---->", "](", "[](", "<", "[a", "\\", "-", " ", "a", "1", "#", "http", "a:", "www."),
    *("violat", "against ", "policy ", "due to ", "content", '"reasons" ', "{", '"', "\u0301"),
]


@pytest.mark.parametrize("name", PATTERNS)
def test_a_regular_expression_takes_linear_time(name):
    function = PATTERNS[name]
    call = (lambda text: function(" ", text)) if name in ("link", "markup", "date") else function

    def look(text):
        with contextlib.suppress(ImagePipelineError):
            call(text)

    for attack in ATTACKS:
        texts = [(attack * length)[:length] for length in (SHORT, LONG)]
        # The second text is eight times as long: quadratic time would be 64 times as long. The
        # constant is for times too short to measure.
        short, long = (seconds(lambda text=text: look(text)) for text in texts)
        assert long < 24 * short + 0.005, attack


class Vocabulary:
    tags = tuple(f"word{number} thing" for number in range(200))
    categories = tags


def test_a_vocabulary_is_normalised_once_per_answer():
    seen = []
    tags = [f"tag{number}" for number in range(200)]
    answers.choose_tags(tags, Vocabulary.tags, lambda text: seen.append(text) or text)
    assert len(seen) == 400


@pytest.mark.parametrize(
    "attack", ["<!---->" * 15_000, "](" * 50_000, "[" * 100_000, "1" * 100_000, "\u0301" * 9_000]
)
def test_a_hostile_answer_is_parsed_in_bounded_time(attack):
    attack = attack[: answers.MAX_ANSWER_CHARACTERS - 200]
    answer = {
        "description": "d",
        "tags": [attack],
        "category": "c",
        "dominantColors": [attack],
        "mood": "m",
    }
    text = json.dumps(answer, ensure_ascii=False)
    for written in (text, text.replace('["' + attack, attack), "{" + attack + "}"):
        try:
            outcome = answers.read_answer(written, Vocabulary).category
        except BadAnswerError:
            outcome = "refused"
        assert outcome in ("other", "refused")
