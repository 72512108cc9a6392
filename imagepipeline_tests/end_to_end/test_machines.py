"""Two machines share one queue, and what is bounded is bounded over both; one that is lost costs time only."""

import json
from collections import Counter

import pytest

from imagepipeline_tests.conftest import IS_CI
from imagepipeline_tests.end_to_end.two_machines import MAX_RUNS, may_name_hosts, open_pair

COMPLETE_SECONDS = 90  # after the cause's end
LIMIT = 6


@pytest.fixture(params=["bucket", "folder"])
def pair(request, tmp_path, postgres_url):
    """Two machines at work, with files and index in a bucket, and in a shared folder."""
    if not may_name_hosts():
        assert not IS_CI
        pytest.skip("no process may have a host name of its own here")
    is_bucket = request.param == "bucket"
    root = request.getfixturevalue("bucket_url") if is_bucket else str(tmp_path / "shared")
    with open_pair(postgres_url, root) as pair:
        yield pair


def read_findings(machine, code=0):
    lines = machine.run("doctor", "--json", code=code).splitlines()
    return {finding["name"]: finding for finding in map(json.loads, lines)}


def test_two_machines_share_the_work_its_bounds_and_its_results(pair):
    pair.provider.hold()
    image_ids = pair.push("first", 12)
    pair.wait_until(lambda: pair.provider.at_once == MAX_RUNS, COMPLETE_SECONDS)  # more than one machine has slots
    assert pair.count()["pending"] == 12 - MAX_RUNS
    pair.provider.release()
    pair.wait_for_completion(12, COMPLETE_SECONDS)
    pair.check(image_ids)
    assert set(pair.provider.calls.values()) == {1}
    assert len(pair.provider.calls) == 12
    hosts = Counter(pair.list_hosts_of_runs())
    assert set(hosts) == {"alpha", "beta"}
    assert hosts.total() == 12
    assert pair.provider.peak == MAX_RUNS

    found = read_findings(pair.alpha)["workers"]
    assert "alpha (3 slots), beta (3 slots)" in found["sentence"]

    calls = pair.provider.calls.total()
    pair.alpha.run("limit", f"metadata={LIMIT}/hour,embedding=off")
    more = pair.push("limited", LIMIT + 4)
    pair.wait_until(lambda: "rate_limit" in pair.alpha.run("status", "--json"), COMPLETE_SECONDS)
    pair.wait_until(lambda: pair.count()["processing"] == 0, COMPLETE_SECONDS)
    assert pair.provider.calls.total() - calls == LIMIT
    pair.alpha.run("limit", "off")
    pair.wait_for_completion(12 + len(more), COMPLETE_SECONDS)
    assert set(pair.provider.calls.values()) == {1}

    pair.beta.kill()
    pair.wait_for_workers({"alpha"})
    found = read_findings(pair.alpha, code=1)["workers"]
    assert "of 4 runs at a time, only 3 find a slot" in found["sentence"]
    pair.check(image_ids + more)
