"""Tenants take turns, keep to their limits and budgets, and see what they have used."""

import json
import math
import uuid

import dagster as dg
import pytest

from imagepipeline.defs.backlog import Backlog
from imagepipeline.defs.sensors import (
    BACKLOG_IMAGES,
    DEFAULT_SLOTS,
    RUNS_PER_SLOT,
    request_backlog_batches,
    request_batches,
    upload_sensor,
)
from imagepipeline.defs.sharing import TENANT_TAG, InFlight
from imagepipeline.errors import InvalidUploadError, TenantSpentError
from imagepipeline.models import BULK_PRIORITY, PaidCall, Recipe, Upload, now_utc
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.reader import Pending
from imagepipeline.tenants import Tenants, describe_used

pytestmark = pytest.mark.stack

LIMIT = RUNS_PER_SLOT * DEFAULT_SLOTS
REMOTE = {"metadata": Recipe("openai", "m"), "embedding": Recipe("openrouter", "e")}


@pytest.fixture
def tick(instance, catalogue, queue, ledger, paid_calls, applier, tenants):
    """A function that runs a tick, adds the runs it requests, and gives the requests."""

    def tick(tenants=tenants, paid_calls=paid_calls):
        resources = {
            "queue": queue,
            "catalogue": catalogue,
            "ledger": ledger,
            "paid_calls": paid_calls,
            "applier": applier,
            "tenants": tenants,
        }
        result = upload_sensor(dg.build_sensor_context(instance=instance, resources=resources))
        requests = [] if isinstance(result, dg.SkipReason) else result.run_requests
        singles = [one for one in requests if one.job_name == "process_upload"]
        for request in singles:
            partition = {"dagster/partition": request.partition_key}
            run = dg.DagsterRun(
                request.job_name,
                str(uuid.uuid4()),
                status=dg.DagsterRunStatus.STARTED,
                tags={**request.tags, **partition},
                asset_selection=request.asset_selection and frozenset(request.asset_selection),
            )
            instance.add_run(run)
        return singles

    return tick


def push(catalogue, tenant, count, priority=0, name=None):
    name = name or tenant or "none"
    uploads = [Upload(f"{name}-{n}", None, priority, tenant) for n in range(count)]
    catalogue.accept(uploads)


def sort_by_priority(requests):
    """The images in the order in which Dagster's queue starts their runs."""
    ordered = sorted(requests, key=lambda one: -int(one.tags["dagster/priority"]))
    return [request.partition_key for request in ordered]


def test_an_entry_may_name_a_tenant():
    upload = Upload.from_entry(b'{"imageId": "cat", "tenant": 42}')
    assert (upload.tenant, upload.ignored) == ("42", ())
    assert Upload.from_entry(upload.to_entry().encode()) == upload
    assert Upload.from_entry(b'{"imageId": "cat", "tenant": null}').to_entry() == "cat"
    for tenant in ("a b", "x" * 65, "*", "-a", "a\nb", [1], {"a": 1}, True):
        entry = json.dumps({"imageId": "cat", "tenant": tenant}).encode()
        with pytest.raises(InvalidUploadError, match="is not a tenant: 1 to 64 letters"):
            Upload.from_entry(entry)


def test_a_push_without_a_tenant_leaves_the_image_to_its_tenant(catalogue_url):
    catalogue = Catalogue(catalogue_url)
    push(catalogue, "acme", 1, name="cat")
    catalogue.accept([Upload("cat-0")])
    assert catalogue.get("cat-0")["tenant"] == "acme"
    catalogue.fail(catalogue.claim("cat-0", 1, "run"), "unexpected", "no")
    catalogue.accept([Upload("cat-0")])
    assert catalogue.get("cat-0")["tenant"] == "acme"
    catalogue.accept([Upload("cat-0", tenant="other")])
    assert catalogue.get("cat-0")["tenant"] == "other"
    catalogue.close()


def test_one_upload_does_not_wait_for_the_many_of_another_tenant(tick, catalogue, instance):
    push(catalogue, "big", 2 * LIMIT)
    first = tick()
    assert len(first) == LIMIT
    assert {request.tags["dagster/priority"] for request in first} == {"0"}  # nothing is shared yet
    instance.report_run_failed(instance.get_runs()[-1])  # a slot is free again
    push(catalogue, "small", 1)
    [request] = tick()
    assert (request.partition_key, request.tags[TENANT_TAG]) == ("small-0", "small")
    assert sort_by_priority([*first, request])[0] == "small-0"


def test_tenants_take_turns_and_priorities_count_within_each(tick, catalogue):
    push(catalogue, "a", 20)
    push(catalogue, "b", 20, priority=9)
    push(catalogue, "a", 1, priority=5, name="urgent-a")
    push(catalogue, "", 20)
    requests = tick()
    tenants = [request.tags.get(TENANT_TAG, "") for request in requests]
    assert sorted(tenants) == [""] * 5 + ["a"] * 5 + ["b"] * 5
    order = sort_by_priority(requests)
    assert set(order[:3]) == {"urgent-a-0", "b-0", "none-0"}
    assert [one for one in order if one.startswith("none")] == [f"none-{n}" for n in range(5)]


def test_many_tenants_are_all_served(tick, catalogue, instance):
    for number in range(20):
        push(catalogue, f"t{number}", 3)
    served = set()
    for _ in range(5):
        served |= {request.tags[TENANT_TAG] for request in tick()}
        for run in instance.get_runs():
            if not run.is_finished:
                image_id = run.tags["dagster/partition"]
                catalogue.fail(catalogue.claim(image_id, 1, run.run_id), "unexpected", "no")
                instance.report_run_failed(run)
    assert len(served) == 20


def test_a_tenant_has_no_more_images_in_runs_than_its_limit(tick, catalogue, ledger):
    limited = Tenants(catalogue, ledger, {"*": 2, "acme": 4}, {})
    for tenant in ("acme", "other", ""):
        push(catalogue, tenant, 10)
    tenants = [request.tags.get(TENANT_TAG, "") for request in tick(limited)]
    assert (tenants.count("acme"), tenants.count("other"), tenants.count("")) == (4, 2, 9)
    assert tick(limited) == []  # all slots of Dagster's queue are taken


@pytest.mark.parametrize("uploads_left", [None, 1])
def test_batches_serve_tenants_in_turn_and_keep_to_limits(catalogue_url, uploads_left):
    catalogue = Catalogue(catalogue_url)
    for tenant, count in (("big", 9), ("mid", 3), ("", 3)):
        push(catalogue, tenant, count)
        for number in range(count if uploads_left is None else 0):
            catalogue.prioritize(f"{tenant or 'none'}-{number}", -1001)
    limits = {"big": 3, "mid": 9, "": 9}
    claims = [catalogue.claim_next("run", uploads_left, limits.__getitem__) for _ in range(9)]
    claimed = [claim.tenant for claim in claims if claim]
    assert {*claimed[:3]} == {"big", "mid", ""}
    counts = (3, 3, 3) if uploads_left is None else (3, 2, 2)
    assert (claimed.count("big"), claimed.count("mid"), claimed.count("")) == counts
    catalogue.close()


def spend(ledger, image_id, cost_usd):
    call = PaidCall(image_id, 1, "metadata", "openai", "m", "answered", 1, 1, cost_usd, 1.0, 0.0)
    ledger.record(call)


def test_what_is_spent_is_looked_up_once_for_all_tenants(catalogue, ledger, monkeypatch):
    tenants = Tenants(catalogue, ledger, {"*": 2}, {"*": 1.0})
    push(catalogue, "acme", 1)
    spend(ledger, "acme-0", 1.5)
    monkeypatch.setattr(ledger, "sum_cost_usd", None)
    summarize, asked = ledger.summarize, []
    monkeypatch.setattr(ledger, "summarize", lambda *what: asked.append(what) or summarize(*what))
    names = ("acme", "other", "")
    assert [tenants.find_max_paid_runs(name) for name in names] == [0, 2, math.inf]
    assert len(asked) == 1


def test_a_budget_of_zero_is_used_up_before_the_first_call(catalogue, ledger):
    names = ("none", "acme", "other", "")
    for budgets, limits in (
        ({"none": 0.0}, [0, math.inf, math.inf, math.inf]),
        ({"*": 0.0, "acme": 1.0, "none": 0.0}, [0, math.inf, 0, math.inf]),
    ):
        tenants = Tenants(catalogue, ledger, {}, budgets)
        assert [tenants.find_max_paid_runs(name) for name in names] == limits
        spent = [name for name in names if name in tenants.find_spent()]
        assert spent == [name for name, limit in zip(names, limits, strict=True) if not limit]
    push(catalogue, "acme", 1)
    spend(ledger, "acme-0", 1.5)
    assert all(name in tenants.find_spent() for name in names[:3])
    push(catalogue, "other", 1)
    assert not catalogue.has_uploads(tenants.find_spent())
    push(catalogue, "", 1)
    assert catalogue.has_uploads(tenants.find_spent())


def test_a_tenant_whose_budget_is_spent_gets_its_pictures_and_waits_for_the_rest(
    tick, catalogue, instance, sqlite_catalogue_url, limiter
):
    ledger = Ledger(sqlite_catalogue_url)
    tenants = Tenants(catalogue, ledger, {}, {"acme": 1.0})
    prices = {"m": (1.0, 1.0), "e": (1.0, 1.0)}
    paid_calls = PaidCalls(ledger, limiter, prices, recipes=REMOTE, tenants=tenants)
    for tenant in ("acme", "other"):
        push(catalogue, tenant, 2)
        spend(ledger, f"{tenant}-0", 1.5)
    requests = tick(tenants, paid_calls)
    full = {one.partition_key for one in requests if one.asset_selection is None}
    assert full == {"other-0", "other-1"}
    assert {one.partition_key for one in requests} - full == {"acme-0", "acme-1"}
    claim = catalogue.claim("acme-0", 1, "run")
    with pytest.raises(TenantSpentError, match="the daily budget of 1 USD of the tenant acme is"):
        paid_calls.make(claim, "metadata", REMOTE["metadata"], lambda: None)
    assert catalogue.claim_next("run", 0, tenants.find_max_paid_runs).tenant == "other"

    push(catalogue, "acme", BACKLOG_IMAGES, name="many")  # no batch could take any of them
    catalogue.prioritize("many-0", BULK_PRIORITY)
    for spent_by, count in ((tenants, 0), (Tenants(catalogue, ledger, {}, {}), 3)):
        requests = [
            *request_batches(catalogue, instance, spent_by, None, [], False, False),
            *request_backlog_batches(catalogue, instance, DEFAULT_SLOTS, spent_by),
        ]
        assert len(requests) == count
    ledger.close()


def test_a_batch_that_takes_one_image_at_a_time_serves_all_tenants(catalogue_url):
    catalogue = Catalogue(catalogue_url)
    catalogue.migrate()
    for tenant in ("a", "b", "c"):
        push(catalogue, tenant, 40)
    served = set()
    for _ in range(40):
        claim = catalogue.claim_next("run", 0)
        catalogue.fail(claim, "unexpected", "no")
        served.add(claim.tenant)
    assert served == {"a", "b", "c"}
    catalogue.close()


def test_what_tenants_have_used_is_shown(queue, catalogue, paid_calls, ledger, tenants):
    push(catalogue, "", 2)
    assert tenants.list_used() == []
    push(catalogue, "acme", 3)
    catalogue.fail(catalogue.claim("acme-0", 1, "run"), "unexpected", "no")
    catalogue.claim("acme-1", 1, "run")
    spend(ledger, "acme-0", 0.25)
    limited = Tenants(catalogue, ledger, {"*": 2}, {"acme": 1.5})
    none, acme = limited.list_used()
    assert (none["tenant"], none["pending"], none["max_runs"]) == ("", 2, None)
    assert acme == {
        "tenant": "acme",
        "pending": 1,
        "processing": 1,
        "failed": 1,
        "max_runs": 2,
        "cost_today_usd": 0.25,
        "daily_budget_usd": 1.5,
    }
    assert describe_used(acme) == "1 pending, 1 processing, 1 failed, 0.25 of 1.5 USD today"
    [row] = ledger.summarize("tenant")
    assert (row["tenant"], row["calls"]) == ("acme", 1)
    backlog = Backlog.measure(queue, catalogue, paid_calls, limited, now_utc())
    table = backlog.build_materialization().metadata["tenants"].value
    assert [record.data["tenant"] for record in table.records] == ["", "acme"]


def test_a_rank_says_how_many_runs_of_the_tenant_come_first():
    in_flight = InFlight.read([])
    alone = [Pending(f"a{n}", 1, 7, "a") for n in range(3)]
    assert in_flight.rank(alone, LIMIT) == [7, 7, 7]
    other, urgent = Pending("b", 1, -1000, "b"), Pending("u", 1, 1000, "a")
    first, second, other, urgent = in_flight.rank([*alone[:2], other, urgent], LIMIT)
    assert urgent > first > other > second > 7
    tags = {"dagster/partition": "u", "imagepipeline/generation": "1", TENANT_TAG: "a"}
    runs = [
        dg.DagsterRun("process_upload", tags={**tags, "dagster/priority": str(priority)})
        for priority in (urgent, second, "junk")
    ]
    assert InFlight.read(runs).priorities["a"] == [1000, 7, 0]


def test_without_tenants_a_backlog_is_ordered_as_before(tick, catalogue):
    push(catalogue, "", BACKLOG_IMAGES + 9)
    catalogue.prioritize("none-40", 3)
    requests = tick()
    assert requests[0].partition_key == sort_by_priority(requests)[0] == "none-40"
    assert {one.tags["dagster/priority"] for one in requests} == {"3", "0"}
    assert not any(TENANT_TAG in request.tags for request in requests)
