"""Batches fetch answers at half the price, are paid for once, and runs find what they fetched."""

import hashlib
import json
import subprocess
import sys

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from werkzeug import Response

from imagepipeline import batch_calls, planning
from imagepipeline.batch_calls import open_batch_calls
from imagepipeline.cli import cli
from imagepipeline.errors import (
    BadAnswerError,
    BatchBusyError,
    BatchError,
    PausedError,
    ProviderUnavailableError,
)
from imagepipeline.filters import Filter
from imagepipeline.models import ImageMetadata, OriginalFacts, PaidCall, Recipe, Upload, now_utc
from imagepipeline.originals import build_originals
from imagepipeline.providers import build_recipes, build_vision, build_vision_recipe
from imagepipeline.settings import Settings
from imagepipeline.stores.batches import Answered, Batches
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.erasures import Erasures
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.tables import batch_requests, provider_batches, provider_calls
from imagepipeline_tests import batch_server
from imagepipeline_tests.batch_server import BatchServer
from imagepipeline_tests.conftest import PHOTOS, count_answers
from imagepipeline_tests.services.test_vision import METADATA, completion

pytestmark = pytest.mark.stack

EARLIER = Recipe("local", "earlier")
NAMES = ("astronaut", "cat", "coffee", "rocket")
HALF_PRICE = (800 * 0.15e-6 + 60 * 0.6e-6) / 2  # of gpt-4o-mini


@pytest.fixture
def provider(httpserver):
    """A provider that answers in batches alone; any other call fails the test."""
    provider = BatchServer(httpserver)
    yield provider
    httpserver.check_assertions()


@pytest.fixture
def environment(tmp_path, redis_url, sqlite_catalogue_url, files, httpserver, monkeypatch):
    """The settings of a remote vision model and a local embedder."""
    (tmp_path / "home").mkdir()
    environment = {
        "IMAGEPIPELINE_HOME": str(tmp_path / "home"),
        "IMAGEPIPELINE_STORAGE_ROOT": str(files.root),
        "DATABASE_URL": sqlite_catalogue_url,
        "REDIS_URL": redis_url,
        "OPENAI_API_KEY": "sk-canary",
        "OPENAI_BASE_URL": httpserver.url_for("/v1"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(batch_calls, "POLL_SECONDS", 0)


def complete(catalogue, files, image_id, photo, recipe=EARLIER):
    """An image that was described by an earlier model, or by another recipe."""
    content = (PHOTOS / f"{photo}.jpg").read_bytes()
    files.put_original(image_id, content, "jpg")
    catalogue.accept([Upload(image_id)])
    claim = catalogue.claim(image_id, 1, f"run-{image_id}")
    sha256 = hashlib.sha256(content).hexdigest()
    path = f"original/{image_id}.jpg"
    facts = OriginalFacts(path, len(content), sha256, 4, 3, "data:", "#000000")
    catalogue.save_original(claim, facts)
    described = ImageMetadata(
        description="old", tags=[], category="c", dominant_colors=[], mood="calm"
    )
    catalogue.save_metadata(claim, described, recipe, sha256)
    for asset in ("variants", "embedding"):
        catalogue.record_result(claim, asset, EARLIER, sha256)
    catalogue.finish(claim)


@pytest.fixture
def library(catalogue, files):
    for name in NAMES:
        complete(catalogue, files, name, name)
    return NAMES


@pytest.fixture
def fetch(environment, catalogue):
    """A function that fetches all answers and gives the last progress."""

    def fetch(*arguments, **options):
        settings = Settings.load()
        with open_batch_calls(settings, catalogue) as calls:
            *_, last = calls.fetch(build_recipes(settings), *arguments, **options)
        return last

    return fetch


def read_calls(url):
    with sa.create_engine(url).connect() as connection:
        calls = provider_calls.c
        query = sa.select(calls.image_id, calls.outcome, calls.cost_usd, calls.batch)
        return sorted(connection.execute(query.order_by(calls.image_id)).tuples())


def count_asked(url):
    with sa.create_engine(url).connect() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(batch_requests)).scalar()


def test_a_batch_asks_about_pictures_in_all_languages_and_leaves_translations_to_runs(
    fetch, provider, catalogue, files, monkeypatch
):
    complete(catalogue, files, "cat", "cat", build_vision_recipe(Settings.load()))
    monkeypatch.setenv("IMAGEPIPELINE_LANGUAGES", "en,de")
    last = fetch()
    assert (last.images, last.requests) == (1, 0)
    complete(catalogue, files, "coffee", "coffee")
    last = fetch()
    assert (last.images, last.requests, last.answered) == (2, 1, 1)


def test_runs_find_what_a_batch_has_fetched_and_pay_nothing(
    fetch, provider, run, catalogue, files, sqlite_catalogue_url
):
    for image_id, photo in (("cat", "cat"), ("coffee", "coffee"), ("twin-of-cat", "cat")):
        complete(catalogue, files, image_id, photo)
    before = [catalogue.get(one) for one in ("cat", "coffee", "twin-of-cat")]
    last = fetch()
    assert (last.images, last.requests, last.answered, last.open) == (3, 2, 2, 0)
    assert [catalogue.get(row["id"]) for row in before] == before
    assert set(provider.charged.values()) == {1}
    assert set(provider.files.values()) == {None}  # all deleted
    assert read_calls(sqlite_catalogue_url) == [
        ("cat", "answered", pytest.approx(HALF_PRICE), 1),
        ("coffee", "answered", pytest.approx(HALF_PRICE), 1),
    ]
    model = Settings.load().vision_model
    usage = Ledger(sqlite_catalogue_url).find_mean_usage("metadata", model)
    assert usage.cost_usd == pytest.approx(2 * HALF_PRICE)  # of an ordinary call

    settings = Settings.load()
    for row in before:
        originals = build_originals(settings, files)
        assert run(row["id"], vision=build_vision(settings), originals=originals).success
        assert catalogue.get(row["id"])["metadata"]["description"] == "A cat"
    assert count_answers(sqlite_catalogue_url) == 0
    assert len(read_calls(sqlite_catalogue_url)) == 2
    assert fetch().requests == 0


KILLS = [
    ("upload", "before"),
    ("upload", "after"),
    ("create", "before"),
    ("create", "after"),
    ("retrieve", "after"),
    ("content", "before"),
    ("content", "after"),
    ("delete", "before"),
]


def test_however_often_it_is_killed_nothing_is_paid_twice(
    environment, provider, catalogue, library, sqlite_catalogue_url
):
    provider.kills, provider.states = [*KILLS], ["in_progress", "completed"]
    exits = []
    command = [sys.executable, "-m", "imagepipeline_tests.fetch_batches"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        for _ in range(len(KILLS) + 1):
            process.stdin.write("start\n")
            provider.client_pid = int(process.stdout.readline())
            process.stdin.write("go\n")
            exits.append(int(process.stdout.readline()))
        process.stdin.close()
    assert provider.kills == []
    assert exits == [-9] * len(KILLS) + [0]
    assert len(provider.batches) == 1
    assert sorted(provider.charged.values()) == [1] * len(NAMES)
    assert [call[:2] for call in read_calls(sqlite_catalogue_url)] == [
        (name, "answered") for name in NAMES
    ]
    assert count_answers(sqlite_catalogue_url) == len(NAMES)
    assert count_asked(sqlite_catalogue_url) == 0


def test_what_a_batch_does_not_answer_is_sent_again_by_the_next(
    fetch, provider, library, sqlite_catalogue_url
):
    provider.faults = {0: 500, 1: "expired", 2: "prose"}
    last = fetch()
    assert (last.images, last.requests, last.answered) == (4, 4, 1)
    assert [(call[1], bool(call[2])) for call in read_calls(sqlite_catalogue_url)] == [
        ("not_answered", False),
        ("bad_output", True),
        ("answered", True),
    ]
    assert count_asked(sqlite_catalogue_url) == 0
    provider.faults = {}
    assert fetch().requests == 3
    assert count_answers(sqlite_catalogue_url) == 4


def test_a_great_plan_is_sent_in_several_batches(fetch, provider, library, monkeypatch):
    monkeypatch.setattr(batch_calls, "MAX_FILE_BYTES", 120_000)  # one or two pictures
    monkeypatch.setattr(batch_calls, "MAX_OPEN", 2)
    last = fetch()
    assert (last.images, last.requests, last.answered) == (4, 4, 4)
    assert max(provider.sizes) <= 120_000
    assert len(provider.batches) > 2
    assert set(provider.charged.values()) == {1}


def test_equal_pictures_that_do_not_fit_into_one_file_are_asked_about_once(
    fetch, provider, catalogue, files, monkeypatch
):
    for image_id in ("first", "second"):
        complete(catalogue, files, image_id, "cat")
    monkeypatch.setattr(batch_calls, "MAX_FILE_BYTES", 80_000)  # one picture
    last = fetch()
    assert (last.images, last.requests, last.answered) == (2, 1, 1)
    assert max(provider.sizes) > 40_000


def test_a_batch_that_is_too_much_waits_for_the_others(fetch, provider, library, monkeypatch):
    monkeypatch.setattr(batch_calls, "MAX_REQUESTS", 2)
    advance = provider.advance

    def refuse_second(batch):
        if batch["id"] == "batch_2":
            batch["states"] = ["failed"]
        return advance(batch)

    provider.advance = refuse_second
    last = fetch()
    assert (last.images, last.requests, last.answered) == (4, 4, 4)
    assert len(provider.batches) == 3
    assert set(provider.charged.values()) == {1}


def test_a_batch_that_is_refused_says_so(fetch, provider, library, sqlite_catalogue_url):
    provider.states = ["validating", "failed"]
    with pytest.raises(BatchError, match=r"refused the batch batch_1 \(token_limit_exceeded\)"):
        fetch()
    assert count_asked(sqlite_catalogue_url) == 0
    provider.states, provider.faults = ["completed"], dict.fromkeys(range(4), 400)
    provider.states = ["validating", "completed"]
    with pytest.raises(BatchError, match="none of 4 requests was answered"):
        fetch()


def test_a_cost_that_the_provider_reports_is_what_the_batch_costs(
    fetch, provider, library, sqlite_catalogue_url, monkeypatch
):
    reported = completion(METADATA)
    reported["usage"]["cost"] = 0.25
    monkeypatch.setattr(batch_server, "completion", lambda answer: reported)
    assert fetch().spent_usd == 1
    assert {call[2] for call in read_calls(sqlite_catalogue_url)} == {0.25}
    usage = Ledger(sqlite_catalogue_url).find_mean_usage("metadata", Settings.load().vision_model)
    assert usage.cost_usd == 0.5  # of an ordinary call


def test_a_batch_that_is_refused_at_once_is_forgotten(
    fetch, provider, library, sqlite_catalogue_url
):
    error = {"message": "no batches of this model", "code": "model_not_found"}
    provider.answers["create"] = provider.answer({"error": error}, 400)
    with pytest.raises(BatchError, match=r"refused a batch, which cost nothing: .* answered 400"):
        fetch()
    assert set(provider.files.values()) == {None}  # deleted
    provider.answers["create"] = provider.answer({"error": error}, 500)
    with pytest.raises(ProviderUnavailableError):
        fetch()
    assert count_asked(sqlite_catalogue_url) == 4  # it may have been created
    provider.answers["create"] = provider.answer({"error": error}, 404)  # the file is gone
    with pytest.raises(BatchError, match=r"refused a batch"):
        fetch()
    assert count_asked(sqlite_catalogue_url) == 0
    provider.answers.clear()
    assert fetch().answered == 4


def test_answers_that_the_provider_does_not_give_are_given_up_after_two_days(
    fetch, provider, library, sqlite_catalogue_url
):
    error = {"message": "no such file"}
    provider.answers["content"] = provider.answer({"error": error}, 404)
    with pytest.raises(BatchError, match="does not give the answers of the batch batch_1"):
        fetch()
    assert count_asked(sqlite_catalogue_url) == 4
    early = now_utc() - batch_calls.GIVEN_UP
    with sa.create_engine(sqlite_catalogue_url).begin() as connection:
        connection.execute(sa.update(provider_batches).values(created_at=early))
    with pytest.raises(BatchError, match="has no answers of the batch batch_1 any more"):
        fetch()
    assert count_asked(sqlite_catalogue_url) == 0
    provider.answers.clear()
    assert fetch().answered == 4


def test_odd_answers_about_a_batch_lose_nothing(fetch, provider, library, sqlite_catalogue_url):
    advance, looks = provider.advance, []

    def answer_oddly(batch):
        looks.append(batch)
        return {"id": "batch_1"} if len(looks) == 1 else advance(batch)

    provider.advance = answer_oddly
    provider.answers["upload"] = provider.answer({"object": "file"})
    with pytest.raises(BadAnswerError, match="cannot be read"):
        fetch()
    provider.answers.clear()
    assert fetch().answered == 4
    assert set(provider.charged.values()) == {1}


def test_a_budget_limits_what_is_sent(fetch, provider, library, sqlite_catalogue_url, monkeypatch):
    with pytest.raises(BatchError, match="what a call costs is not known"):
        fetch(budget_usd=1)
    model = Settings.load().vision_model
    monkeypatch.setenv("IMAGEPIPELINE_PRICES", json.dumps({model: [12.5, 0]}))
    call = PaidCall("x", 1, "metadata", "openai", model, "answered", 800, 60, 0.01, 2.0, 0.0)
    ledger = Ledger(sqlite_catalogue_url)
    ledger.record(call)
    last = fetch(budget_usd=0.012)  # two at half of a cent
    assert (last.images, last.requests, last.answered) == (2, 2, 2)
    last = fetch(Filter.parse(["id=r*"]), limit=1)
    assert (last.images, last.requests) == (1, 1)
    ledger.pause("auth", "bad key", None)
    with pytest.raises(PausedError, match="bad key"):
        fetch()
    ledger.resume()
    monkeypatch.setenv("IMAGEPIPELINE_DAILY_BUDGET_USD", "0.0251")
    assert fetch().requests == 0


def record(ledger, image_id, cost_usd):
    model = Settings.load().vision_model
    ledger.record(
        PaidCall(image_id, 1, "metadata", "openai", model, "answered", 800, 60, cost_usd, 2.0, 0.0)
    )


@pytest.mark.parametrize("budgets", ['{"acme": 0.01}', '{"acme": 0}', '{"*": 0}'])
def test_images_of_a_tenant_whose_budget_is_spent_are_passed_over(
    fetch, provider, catalogue, library, sqlite_catalogue_url, monkeypatch, budgets
):
    catalogue.accept([Upload("cat", tenant="acme")])
    catalogue.finish(catalogue.claim("cat", 2, "run"))
    monkeypatch.setenv("IMAGEPIPELINE_TENANT_DAILY_BUDGETS_USD", budgets)
    if "0.01" in budgets:
        record(Ledger(sqlite_catalogue_url), "cat", 0.02)
    last = fetch()
    assert (last.images, last.requests) == (3, 3)
    assert {call[0] for call in read_calls(sqlite_catalogue_url) if call[3]} == {*NAMES} - {"cat"}


def test_a_budget_counts_what_the_batches_cost_and_no_other_calls(
    environment, provider, catalogue, library, sqlite_catalogue_url, monkeypatch
):
    ledger, advance = Ledger(sqlite_catalogue_url), provider.advance
    record(ledger, "earlier", 2 * HALF_PRICE)

    def record_upload(batch):
        record(ledger, "upload", 2 * HALF_PRICE)
        return advance(batch)

    def apply(budget_usd, *options):
        arguments = ["apply", "--batch", "--json", "--budget", str(budget_usd), *options]
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        [row] = json.loads(result.stdout)
        return row["spent_usd"], result.stderr.splitlines()[-1]

    def follow(applies, apply):
        begun.append(apply)
        applies.end(apply.id, planning.STOPPED)
        yield applies.measure(apply.id)

    begun = []
    monkeypatch.setattr(planning, "follow", follow)
    provider.advance = record_upload
    monkeypatch.setattr(batch_calls, "MAX_REQUESTS", 1)
    assert apply(3.9 * HALF_PRICE)[0] == pytest.approx(3 * HALF_PRICE)
    assert (begun[0].budget_usd, begun[0].max_images) == (3.9 * HALF_PRICE, 3)
    for _ in range(20):
        record(ledger, "cheap", 0.1 * HALF_PRICE)
    spent_usd, said = apply(0.9 * HALF_PRICE)
    assert spent_usd == pytest.approx(HALF_PRICE)
    assert said == "The budget is used up; the next apply uses the answers that are paid."
    nothing = "Nothing is planned, or the budget allows no call."
    assert apply(1, "--where", "id=nobody") == (0, nothing)
    assert len(begun) == 1


def test_a_plan_says_what_open_batches_ask_and_an_apply_waits_for_them(
    environment, provider, catalogue, library
):
    settings = Settings.load()
    with open_batch_calls(settings, catalogue) as calls:
        steps = calls.fetch(build_recipes(settings))
        next(steps)
        steps.close()  # Ctrl-C
    planned = CliRunner().invoke(cli, ["plan", "--asset", "metadata", "--json"])
    assert [row["in_batches"] for row in json.loads(planned.stdout)] == [4, 0, 0]
    assert "Note: batches with 4 questions are open at the provider" in planned.stderr
    refused = CliRunner().invoke(cli, ["apply"]).exception
    assert isinstance(refused, BatchBusyError)
    assert "continue with `imagepipeline apply --batch`" in str(refused)


@pytest.mark.parametrize(
    "response", [Response("no", 404), Response("<html>"), Response("{}"), Response("[]")]
)
def test_a_provider_without_batches_is_refused(fetch, httpserver, response):
    httpserver.expect_request("/v1/batches").respond_with_response(response)
    with pytest.raises(BatchError, match="has no Batch API: run `apply` without --batch"):
        fetch()


def test_a_local_model_needs_no_batches(environment, catalogue, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name)
    result = CliRunner().invoke(cli, ["apply", "--batch"])
    assert "the local models need no batches" in str(result.exception)


@pytest.fixture
def batches(catalogue_url):
    return Batches(catalogue_url)


def test_one_process_at_a_time_holds_the_batches(batches, catalogue_url):
    with batches.hold(), pytest.raises(BatchBusyError), Batches(catalogue_url).hold():
        pass
    with batches.hold():
        pass


def test_an_answer_is_collected_once(batches, catalogue_url):
    recipe = Recipe("openai", "m")
    seq = batches.begin("metadata", recipe, {"a" * 64: "cat", "b" * 64: "dog"})
    assert [batch.seq for batch in batches.list_open("metadata", recipe)] == [seq]
    assert batches.list_open("metadata", Recipe("openai", "other")) == []
    answered = [
        Answered("a" * 64, "answered", 800, 60, 0.1, "{}"),
        Answered("a" * 64, "answered", 800, 60, 0.1, "{}"),
        Answered("c" * 64, "answered", 800, 60, 0.1, "{}"),  # nobody asked this
    ]
    for _ in range(2):
        batches.collect(seq, answered)
    assert batches.count_answered([seq]) == 1
    assert [call[:2] for call in read_calls(catalogue_url)] == [("cat", "answered")]
    assert batches.is_asked("b" * 64)
    batches.end(seq, "expired")
    assert not batches.is_asked("b" * 64)
    assert batches.list_open("metadata", recipe) == []
    other = batches.begin("metadata", recipe, {"b" * 64: "dog"})
    batches.drop(other)
    assert not batches.is_asked("b" * 64)


def test_of_an_image_that_was_erased_while_a_batch_asked_only_the_cost_is_kept(
    batches, catalogue_url
):
    catalogue = Catalogue(catalogue_url)
    catalogue.accept([Upload("cat")])
    catalogue.cancel("cat", "it is being erased")
    seq = batches.begin("metadata", Recipe("openai", "m"), {"a" * 64: "cat"})
    Erasures(catalogue_url).remove("cat", catalogue.get("cat")["fence"], [])
    batches.collect(seq, [Answered("a" * 64, "answered", 800, 60, 0.1, "{}")])
    assert [call[:2] for call in read_calls(catalogue_url)] == [(None, "answered")]
    assert batches.sum_cost_usd([seq]) == 0.1
    assert Ledger(catalogue_url).find_answer("a" * 64) is None
    catalogue.close()
