"""With 100,000 images no tick and no page reads more than it needs, by an index."""

import re
from contextlib import closing
from datetime import timedelta

import dagster as dg
import pytest
import sqlalchemy as sa

from imagepipeline.defs import reconciler as reconciling
from imagepipeline.defs.checks import Recent
from imagepipeline.defs.sensors import upload_sensor
from imagepipeline.models import Recipe, StoredFile, Upload, now_utc
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.planning import Applier
from imagepipeline.stores.applies import Applies
from imagepipeline.stores.batches import Batches
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.database import Database
from imagepipeline.stores.erasures import Erasures
from imagepipeline.stores.events import EventLog
from imagepipeline.stores.failures import FailedImages
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.outbox import Outbox
from imagepipeline.stores.plans import Plans
from imagepipeline.stores.retention import Retention
from imagepipeline.tenants import Tenants
from imagepipeline_tests.defs.conftest import RECIPES
from imagepipeline_tests.made_rows import make_rows

COUNT = 100_000
LARGE = ("images", "image_results", "image_history", "provider_calls", "events")
TICK_STATEMENTS = 40  # of an upload tick that starts fifteen runs; it was 37


class Statements:
    """The statements that a database has executed, and how it would find their rows."""

    def __init__(self, url):
        self.engine = Database(url).engine
        self.seen = []
        sa.event.listen(self.engine, "before_cursor_execute", self._note)

    def _note(self, _, cursor, statement, parameters, context, is_many):
        if re.match(r"SELECT|UPDATE|DELETE", statement) and not is_many:
            self.seen.append((statement, parameters))

    def stop(self):
        sa.event.remove(self.engine, "before_cursor_execute", self._note)

    def find_scans(self):
        """The tables that a statement reads as a whole, with the statement.

        The indexes `ix_events_for_…` have only what must still be sent.
        """
        is_sqlite = self.engine.dialect.name == "sqlite"
        scan = re.compile(
            r"SCAN (\w+)(?! USING INDEX ix_events_for_)" if is_sqlite else r"Seq Scan on (\w+)"
        )
        return {
            f"{table}: {plan}"
            for plan in self.explain()
            for table in scan.findall(plan)
            if table in LARGE
        }

    def explain(self):
        """Each statement with its plan."""
        is_sqlite = self.engine.dialect.name == "sqlite"
        prefix = "EXPLAIN QUERY PLAN " if is_sqlite else "EXPLAIN "
        with self.engine.connect() as connection:
            for statement, parameters in self.seen:
                rows = connection.exec_driver_sql(prefix + statement, parameters)
                yield "\n".join([statement, *(str(row[-1]) for row in rows)])


@pytest.mark.stack
def test_nothing_scans(catalogue_url, queue, instance, limiter, tasks):
    make_rows(catalogue_url, COUNT, days=90, is_lean=True)
    now = now_utc()
    catalogue, ledger = Catalogue(catalogue_url), Ledger(catalogue_url)
    plans, retention = Plans(catalogue_url), Retention(catalogue_url)
    applier = Applier(
        Applies(catalogue_url), plans, catalogue, ledger, Batches(catalogue_url), RECIPES
    )
    paid_calls = PaidCalls(ledger, limiter, {}, daily_budget_usd=1e6)
    statements = Statements(catalogue_url)
    resources = {
        "queue": queue,
        "catalogue": catalogue,
        "ledger": ledger,
        "paid_calls": paid_calls,
        "applier": applier,
        "tenants": Tenants(catalogue, ledger, {"*": 20}, {"*": 1e6}),
    }
    queue.enqueue("new")
    with closing(catalogue):
        context = dg.build_sensor_context(instance=instance, resources=resources)
        result = upload_sensor(context)
        assert len(result.run_requests) == 15 + 2  # and two batches
        assert len(statements.seen) <= TICK_STATEMENTS
        reconciling.reconcile(catalogue, instance, tasks, reconciling.StandstillWatch())
        Recent.load(catalogue, now)
        catalogue.list_pending(15, is_rotating=True)
        catalogue.claim_next("run")
        catalogue.claim_next("run", 15)
        catalogue.count_by_tenant("processing")
        catalogue.find_oldest()
        catalogue.reopen("provider_unavailable", now - timedelta(hours=1))
        ledger.sum_cost_usd(now - timedelta(days=90))
        ledger.sum_cost_usd(now - timedelta(hours=1))
        ledger.summarize("day", now - timedelta(days=30))
        ledger.find_mean_usage("metadata", "a-model")
        ledger.find_last_usage("openai", "a-model")
        ledger.count_unanswered("metadata")
        catalogue.find_twins("metadata", Recipe("local", "a-model"), "f" * 64, 3)
        catalogue.find_twin_metadata(Recipe("local", "a-model"), "f" * 64)
        # Pages and commands.
        assert catalogue.get("made-7")["id"] == "made-7"
        catalogue.sum_cost_usd("made-7")
        catalogue.find_owners({0: Upload("x", "original/made-9.jpg")})
        catalogue.find_unknown({"made-1": "original/made-1.jpg", "y": "original/y.jpg"})
        file = StoredFile("original/made-1.jpg", 1, changed_at=now)
        assert catalogue.find_replaced({"made-1": file}) == ["made-1"]
        catalogue.list_ended("completed", now - timedelta(hours=1))
        catalogue.list_ended("failed", limit=50)
        catalogue.list_unended("pending", 50)
        catalogue.count_failures()
        failures = FailedImages(catalogue_url).iterate()
        assert len([row for row, _ in zip(failures, range(1500), strict=False)]) == 1500
        outdated = {"metadata": Recipe("local", "another")}
        assert len(plans.list_outdated(outdated, "made-5", 30)) == 30
        # What is relayed and pruned.
        log = EventLog(catalogue_url)
        log.list_unsent(500), log.list_owed(25), log.prune(), log.list_latest("made-9", 5)
        Outbox(catalogue_url).list_unsent("mail")
        assert len(retention.list_oldest(50)) == 50
        assert len(retention.list_oldest(50, ("runs",), now - timedelta(days=7))) == 50
        assert retention.prune_calls(now - timedelta(days=80), 50) == 50
        retention.prune_notices(now, ["mail"], 50)
        statements.stop()
        assert statements.find_scans() == set()


def test_what_is_rare_is_not_looked_for_in_all_rows(sqlite_catalogue_url):
    catalogue, ledger = Catalogue(sqlite_catalogue_url), Ledger(sqlite_catalogue_url)
    catalogue.accept([Upload("a"), Upload("b")])
    for image_id in ("a", "b"):
        catalogue.fail(catalogue.claim(image_id, 1, "run"), "poison", "it kills")
    statements = Statements(sqlite_catalogue_url)
    ledger.find_last_usage("openai", "not answered yet")
    ledger.find_mean_usage("metadata", "not answered yet")
    assert [plan for plan in statements.explain() if "ix_provider_calls_answered" not in plan] == []
    statements.seen.clear()
    catalogue.find_free_paths(["variants/a.webp"])
    catalogue.distrust_files("a", ["variants/a.webp"])
    Erasures(sqlite_catalogue_url).find_foreign("a", ["variants/a.webp"])
    assert [plan for plan in statements.explain() if "SCAN" in plan] == []
    statements.seen.clear()
    assert len([*FailedImages(sqlite_catalogue_url).iterate(page_rows=1)]) == 2
    _, *later = statements.explain()
    assert [plan for plan in later if "updated_at<?" not in plan] == []
    statements.seen.clear()
    Plans(sqlite_catalogue_url).list_outdated(RECIPES, "a", 9, until_id="b")
    assert [plan for plan in statements.explain() if "images USING INDEX ix" in plan] == []
    statements.stop()
    catalogue.close()


def test_a_claim_asks_only_tenants_whose_images_are_in_its_lane(catalogue_url):
    with closing(Catalogue(catalogue_url)) as catalogue:
        catalogue.accept([Upload(f"image-{n}", None, 0, f"tenant-{n}") for n in range(20)])
        catalogue.accept_imported([Upload("planned", None, 0, "another")])
        statements = Statements(catalogue_url)
        assert catalogue.claim_next("run").image_id == "planned"
        assert not catalogue.has_next(None, lambda tenant: 1)
        statements.stop()
        of_tenants = [one for one, _ in statements.seen if "images.tenant =" in one]
        assert len(of_tenants) < 5
