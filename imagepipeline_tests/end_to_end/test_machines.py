"""Two machines share the work and its limits, and the loss of one loses no image."""

import json
from collections import Counter

import pytest

from imagepipeline.defs.attempts import MACHINE_TAG
from imagepipeline_tests.conftest import IS_CI
from imagepipeline_tests.end_to_end.two_machines import MAX_RUNS, can_set_host_names, open_pair

pytestmark = pytest.mark.drills

FIRST, LIMIT = 8, 4
PATIENCE_SECONDS = 240
CALL_USD = (800 * 0.15 + 60 * 0.60) / 1_000_000  # what the provider reports of a description
PAID_CALLS = FIRST + LIMIT + 2 + 6 + 2
# The month's budget, as a day may end during the test; both are the same sum over other times.
BUDGET = {"IMAGEPIPELINE_MONTHLY_BUDGET_USD": f"{PAID_CALLS * CALL_USD:.6f}"}


@pytest.fixture
def pair_in(postgres_url):
    """A function that starts two machines with files and index below a root."""
    if not can_set_host_names():
        assert not IS_CI
        pytest.skip("this system does not allow UTS namespaces")
    return lambda root: open_pair(postgres_url, root, **BUDGET)


def read_findings(machine, code=0):
    lines = machine.run("doctor", "--json", code=code).splitlines()
    return {finding["name"]: finding for finding in map(json.loads, lines)}


def test_two_machines_share_the_work_its_limits_and_its_results(pair_in, bucket_url):
    with pair_in(bucket_url) as pair:
        pair.provider.hold()
        pair.push("first", FIRST)
        # One machine has fewer slots.
        pair.wait_until(lambda: pair.provider.at_once == MAX_RUNS, PATIENCE_SECONDS)
        assert pair.count()["pending"] == FIRST - MAX_RUNS
        pair.provider.release()
        pair.wait_until_completed(PATIENCE_SECONDS)
        assert pair.provider.peak == MAX_RUNS
        assert list(pair.provider.calls.values()) == [1] * FIRST
        hosts = Counter(run.tags[MACHINE_TAG] for run in pair.list_runs())
        assert set(hosts) == {"alpha", "beta"}
        assert hosts.total() == FIRST
        pair.check()

        assert "alpha (3 slots), beta (3 slots)" in read_findings(pair.alpha)["workers"]["sentence"]

        calls = pair.provider.calls.total()
        pair.alpha.run("limit", f"metadata={LIMIT}/hour")
        pair.push("limited", LIMIT + 2)
        pair.wait_until(lambda: pair.count()["completed"] == FIRST + LIMIT, PATIENCE_SECONDS)
        pair.wait_until(
            lambda: "rate_limit" in pair.alpha.run("status", "--json"), PATIENCE_SECONDS
        )
        assert pair.provider.calls.total() - calls == LIMIT

        pair.alpha.run("limit", "--reset")
        pair.wait_until_completed(PATIENCE_SECONDS)
        pair.provider.refuses = True
        pair.push("refused", 6)
        pair.wait_until(lambda: "auth" in pair.list_pauses(), PATIENCE_SECONDS)
        assert '"paused": "auth' in pair.beta.run("status", "--json")
        pair.wait_until(lambda: pair.count()["processing"] == 0, PATIENCE_SECONDS)
        assert 0 < pair.provider.refused <= MAX_RUNS  # then neither machine asks again
        pair.provider.refuses = False
        pair.beta.run("resume")
        pair.wait_until_completed(PATIENCE_SECONDS)
        pair.check()

        spent = pair.push("spent", 8)
        pair.wait_until(lambda: "budget" in pair.list_pauses(), PATIENCE_SECONDS)
        assert '"paused": "budget' in pair.beta.run("status", "--json")
        # The others get their pictures, which cost nothing.
        pair.wait_until(
            lambda: all(len(pair.catalogue.get(one)["variants"]) == 6 for one in spent),
            PATIENCE_SECONDS,
        )
        # Calls that were under way are answered.
        assert PAID_CALLS <= pair.provider.calls.total() < PAID_CALLS + MAX_RUNS
