"""The queue, the index and outdated results are shown with history, without runs."""

from contextlib import closing
from datetime import timedelta

import dagster as dg
import pytest

from imagepipeline.definitions import build_recipes
from imagepipeline.defs.backlog import (
    MAX_AGE,
    REPORT_EVERY,
    STUCK_AFTER,
    Backlog,
    Reported,
    queue_sensor,
)
from imagepipeline.defs.index import index_sensor
from imagepipeline.models import BULK_PRIORITY, Recipe, Upload, now_utc
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.settings import Settings
from imagepipeline.stores.limiter import CallLimiter
from imagepipeline.stores.plans import Plans
from imagepipeline.stores.uploads import UploadQueue

CHECKS = ("not_stuck", "none_waits_long", "no_pause", "nothing_to_mend", "no_dead_letters")
PASSED = dict.fromkeys(CHECKS, True)


@pytest.fixture
def measure(queue, catalogue, paid_calls, tenants):
    """A function that measures the backlog some time from now; gives it and what its checks say."""

    def measure(later=timedelta(0), **changes):
        resources = {"queue": queue, "paid_calls": paid_calls, "tenants": tenants} | changes
        backlog = Backlog.measure(catalogue=catalogue, now=now_utc() + later, **resources)
        return backlog, {one.check_name: one for one in backlog.evaluate()}

    return measure


def list_passed(results):
    return {name: one.passed for name, one in results.items()}


def test_an_idle_stack_is_well(measure):
    backlog, results = measure()
    assert list_passed(results) == PASSED
    assert (backlog.oldest_seconds, backlog.paused) == (0, "no")
    assert backlog.figures["pending_count"] == backlog.figures["waiting_count"] == 0


def test_uploads_that_no_run_takes_are_stuck_and_wait_long(measure, catalogue):
    catalogue.accept([Upload("a"), Upload("b")])
    catalogue.claim("a", 1, "run")
    catalogue.fail(catalogue.claim_anew("c", "run"), "corrupt", "it is damaged")
    backlog, results = measure()
    assert list_passed(results) == PASSED
    assert backlog.figures["pending_count"] == backlog.figures["processing_count"] == 1
    assert backlog.figures["failed_last_hour_count"] == 1
    shown = backlog.build_materialization().metadata
    [failure] = shown["failures"].records
    assert (failure.data["image"], failure.data["why"]) == ("c", "corrupt: it is damaged")
    backlog, results = measure(MAX_AGE + timedelta(seconds=10))
    assert 3610 <= backlog.oldest_seconds < 3700
    assert results["none_waits_long"].severity == dg.AssetCheckSeverity.ERROR
    assert not results["none_waits_long"].passed


def test_a_queue_in_which_nothing_moves_is_red_unless_paid_work_is_paused(
    measure, catalogue, ledger
):
    catalogue.accept([Upload("a")])
    later = STUCK_AFTER + timedelta(seconds=10)
    _, results = measure(later)
    assert not results["not_stuck"].passed
    assert "imagepipeline doctor" in results["not_stuck"].description
    ledger.pause("bad_key", "the key is wrong", None)
    backlog, results = measure(later)
    assert results["not_stuck"].passed
    assert not results["no_pause"].passed
    assert results["no_pause"].severity == dg.AssetCheckSeverity.ERROR
    assert backlog.paused == "bad_key, until `imagepipeline resume`: the key is wrong"
    ledger.resume()
    ledger.pause("budget", "it is spent", 60)
    _, results = measure(later)
    assert results["no_pause"].severity == dg.AssetCheckSeverity.WARN


def test_failures_that_need_an_operator_are_red_until_they_are_retried_or_discarded(
    measure, catalogue
):
    for image_id, reason in (("a", "corrupt"), ("b", "cancelled")):
        catalogue.fail(catalogue.claim_anew(image_id, "run"), reason, "why")
    assert list_passed(measure()[1]) == PASSED
    catalogue.fail(catalogue.claim_anew("c", "run"), "missing", "there is no original/c.*")
    _, results = measure()
    assert list_passed(results) == PASSED | {"nothing_to_mend": False}
    assert results["nothing_to_mend"].description.startswith("Images have failed (missing): see")
    catalogue.accept([Upload("c")])
    assert list_passed(measure()[1]) == PASSED


def test_planned_work_may_wait_long(measure, catalogue):
    catalogue.accept([Upload("a")])
    catalogue.prioritize("a", BULK_PRIORITY)
    backlog, _ = measure(2 * MAX_AGE)
    assert backlog.oldest_seconds == 0


def test_dead_letters_and_a_silent_redis_are_told(measure, queue):
    queue.dead_letter(b"../x", 1, "it is no ID")
    _, results = measure()
    assert results["no_dead_letters"].description.startswith("1 unreadable entries wait")
    with closing(UploadQueue("unix:///nowhere.sock")) as silent:
        backlog, results = measure(queue=silent)
    assert not results["not_stuck"].passed
    assert "waiting_count" not in backlog.figures
    assert backlog.build_materialization().metadata["problem"].value == backlog.problem


def test_the_use_of_limits_and_budgets_is_shown_for_paid_models(measure, ledger, redis_url):
    recipes = {"metadata": Recipe("openai", "m")}
    with closing(CallLimiter(redis_url, "use", "metadata=10/hour")) as limiter:
        paid_calls = PaidCalls(ledger, limiter, {"m": (1.0, 1.0)}, 5.0, recipes=recipes)
        limiter.acquire("metadata", 0)
        backlog, _ = measure(paid_calls=paid_calls)
    assert backlog.figures["metadata_calls_used"] == 1
    assert backlog.figures["metadata_calls_limit"] == 10
    assert backlog.figures["daily_budget_usd"] == 5
    assert backlog.figures["cost_today_usd"] == 0


def test_the_sensor_reports_what_changes_and_the_rest_every_quarter_of_an_hour(
    instance, queue, catalogue, paid_calls, tenants
):
    def tick(cursor):
        resources = {"queue": queue, "catalogue": catalogue, "paid_calls": paid_calls}
        resources |= {"tenants": tenants}
        context = dg.build_sensor_context(instance=instance, cursor=cursor, resources=resources)
        return queue_sensor(context)

    first = tick(None)
    assert len(first.asset_events) == 1 + len(PASSED)
    assert isinstance(tick(first.cursor), dg.SkipReason)
    queue.dead_letter(b"../x", 1, "it is no ID")
    second = tick(first.cursor)
    kinds = [type(event) for event in second.asset_events]
    assert kinds == [dg.AssetMaterialization, dg.AssetCheckEvaluation]
    reported = Reported.model_validate_json(second.cursor)
    earlier = reported.model_copy(update={"at": reported.at - REPORT_EVERY})
    assert len(tick(earlier.model_dump_json()).asset_events) == 1


def test_index_and_outdated_say_what_search_finds_and_what_is_to_be_made(
    instance, catalogue, sqlite_catalogue_url, tmp_path
):
    recipes = build_recipes(Settings.load({}))
    catalogue.accept([Upload(image_id) for image_id in "abc"])
    for image_id, recipe in (("a", recipes["embedding"]), ("b", Recipe("openrouter", "earlier"))):
        catalogue.record_result(catalogue.claim(image_id, 1, "run"), "embedding", recipe, "0" * 64)
    resources = {"plans": Plans(sqlite_catalogue_url), "recipes": recipes}
    fragment = tmp_path / "index" / "table.lance" / "data" / "1.lance"
    fragment.parent.mkdir(parents=True)
    fragment.write_bytes(bytes(1000))
    resources["index_uri"] = str(tmp_path / "index")

    def tick(cursor):
        context = dg.build_sensor_context(instance=instance, cursor=cursor, resources=resources)
        return index_sensor(context)

    first = tick(None)
    shown = {
        event.asset_key.to_user_string(): {name: one.value for name, one in event.metadata.items()}
        for event in first.asset_events
    }
    assert (shown["index"]["searchable_count"], shown["index"]["unsearchable_count"]) == (1, 1)
    assert (shown["index"]["index_bytes"], shown["index"]["fragment_count"]) == (1000, 1)
    assert shown["outdated"]["embedding_model_count"] == 1
    assert shown["outdated"]["embedding_missing_count"] == 1
    assert shown["outdated"]["metadata_missing_count"] == 3
    assert shown["outdated"]["variants_settings_count"] == 0
    assert isinstance(tick(first.cursor), dg.SkipReason)
