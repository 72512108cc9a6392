"""The doctor finds problems, says what to do, and shows no secret."""

import json
import time
from contextlib import closing
from datetime import timedelta

import pytest

from imagepipeline.doctor import examine
from imagepipeline.errors import RedisClusterError
from imagepipeline.homes import secure_home
from imagepipeline.models import Embedding, Upload, now_utc
from imagepipeline.providers import build_recipes
from imagepipeline.runtime import services
from imagepipeline.settings import Settings
from imagepipeline.stores import uploads
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.events import EventLog
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline.stores.vectors import EmbeddingIndex
from imagepipeline_tests.conftest import redis_server
from imagepipeline_tests.services.test_embedder import answer_of
from imagepipeline_tests.services.test_vision import METADATA, coded, completion

pytestmark = pytest.mark.stack


@pytest.fixture
def environment(tmp_path, redis_url, create_catalogue):
    home = tmp_path / "home"
    (home / "storage").mkdir(parents=True)
    create_catalogue(home / "catalogue.sqlite")
    environment = {"IMAGEPIPELINE_HOME": str(home), "REDIS_URL": redis_url}
    secure_home(Settings.load(environment))
    return environment


# The tests in end_to_end examine a running stack.
STACK = {"supervisor", "code server", "workers", "daemon", "sensors", "webserver"}


def examine_all(environment):
    return {finding.name: finding for finding in examine(Settings.load(environment))}


def findings(environment):
    return {
        name: finding for name, finding in examine_all(environment).items() if name not in STACK
    }


def problems(environment):
    return {name: finding for name, finding in findings(environment).items() if not finding.is_well}


def test_a_healthy_local_pipeline_has_no_problems(environment):
    found = findings(environment)
    assert all(finding.is_well and not finding.advice for finding in found.values()), found
    assert list(found) == [
        "home",
        "redis",
        "database",
        "storage",
        "index",
        "clock",
        "limits",
        "prices",
        "sandbox",
        "vision model",
        "embedding model",
        "pauses",
        "events",
    ]


def test_vectors_that_the_index_misses_are_a_problem(environment):
    settings = Settings.load(environment)
    recipe = build_recipes(settings)["embedding"]
    with closing(Catalogue(settings.database_url)) as catalogue:
        catalogue.accept([Upload("a"), Upload("waits")])
        claim = catalogue.claim("a", 1, "run")
        catalogue.record_result(claim, "embedding", recipe, "0" * 64)
    found = problems(environment)["index"]
    assert found.sentence == "search misses 1 of 1 images: their vectors are not in it"
    assert "IMAGEPIPELINE_INDEX_ROOT" in found.advice
    index = EmbeddingIndex(settings.index_uri)
    index.upsert(claim, Embedding("a text", (1.0, 0.0), "an-earlier-model"))
    assert "index" in problems(environment)
    index.upsert(claim, Embedding("a text", (1.0, 0.0), recipe.version))
    found = findings(environment)["index"]
    assert (found.is_well, found.sentence) == (
        True,
        "it is readable; 1 embeddings of today's model",
    )


def test_events_that_do_not_reach_the_app_are_a_problem(environment):
    url = Settings.load(environment).database_url
    log = EventLog(url)
    log.open_webhook()
    log.note_webhook_failure("the webhook answered 500")
    finding = problems(environment)["events"]
    assert finding.sentence == "the webhook failed 1 times in a row: the webhook answered 500"
    earlier = Catalogue(url, lambda: now_utc() - timedelta(hours=1))
    earlier.fail(earlier.claim_anew("a", "run"), "corrupt", "x")
    assert "waited for the Redis stream since" in problems(environment)["events"].sentence


def remote(environment, httpserver):
    return environment | {
        "OPENAI_API_KEY": "sk-canary-1",
        "OPENAI_BASE_URL": httpserver.url_for("/v1"),
        "OPENROUTER_API_KEY": "sk-canary-2",
        "OPENROUTER_BASE_URL": httpserver.url_for("/v1"),
        "IMAGEPIPELINE_RATE_LIMIT": "off",
    }


def test_each_remote_model_gets_one_small_call(environment, httpserver):
    httpserver.expect_request("/v1/chat/completions").respond_with_json(completion(METADATA))
    httpserver.expect_request("/v1/embeddings").respond_with_json(answer_of([1.0, 2.0]))
    found = findings(remote(environment, httpserver))
    assert all(finding.is_well for finding in found.values()), found
    assert "gpt-4o-mini answered in" in found["vision model"].sentence
    assert "2 dimensions" in found["embedding model"].sentence
    assert len(httpserver.log) == 2
    assert sum(len(request.get_data()) for request, _ in httpserver.log) < 5000


def test_a_bad_key_is_reported_with_advice_but_not_shown(environment, httpserver):
    httpserver.expect_request("/v1/chat/completions").respond_with_json(
        coded("invalid_api_key"), 401
    )
    httpserver.expect_request("/v1/embeddings").respond_with_json(answer_of([1.0, 2.0]))
    found = problems(remote(environment, httpserver))
    assert "401 (invalid_api_key)" in found["vision model"].sentence
    assert "OPENAI_API_KEY" in found["vision model"].advice
    assert "paused (auth)" in found["pauses"].sentence
    assert "canary" not in repr(found)


def test_a_provider_without_json_schema_is_reported_with_the_setting(environment, httpserver):
    def answer(request):
        from werkzeug import Response

        kind = request.get_json().get("response_format", {}).get("type")
        if kind == "json_schema":
            return Response(
                json.dumps(coded("x", param="response_format")),
                400,
                content_type="application/json",
            )
        return Response(json.dumps(completion(METADATA)), content_type="application/json")

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    httpserver.expect_request("/v1/embeddings").respond_with_json(answer_of([1.0, 2.0]))
    found = problems(remote(environment, httpserver))
    assert set(found) == {"vision model"}
    assert "IMAGEPIPELINE_ANSWER_FORMAT" in found["vision model"].advice


@pytest.mark.parametrize(
    ("broken", "names"),
    [
        ({"REDIS_URL": "redis://:canary@127.0.0.1:9/0"}, {"redis", "clock"}),
        (
            {"DATABASE_URL": "postgresql://u:canary@127.0.0.1:9/d"},
            {"database", "pauses", "events"},
        ),
        (
            {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "IMAGEPIPELINE_RATE_LIMIT": "off"},
            {"vision model"},
        ),
    ],
)
def test_a_service_that_is_down_is_reported_and_the_rest_is_examined(environment, broken, names):
    found = problems(environment | broken)
    assert set(found) == names
    assert all(finding.advice for finding in found.values())
    assert "canary" not in repr(found)


def test_a_storage_root_that_is_not_writable_is_reported(environment, tmp_path):
    (tmp_path / "file").write_text("x")
    found = problems(environment | {"IMAGEPIPELINE_STORAGE_ROOT": str(tmp_path / "file")})
    assert set(found) == {"storage"}
    assert "IMAGEPIPELINE_STORAGE_ROOT" in found["storage"].advice


def test_an_index_that_is_not_readable_is_reported(environment, tmp_path):
    (tmp_path / "home" / "lancedb").write_text("no folder")
    found = problems(environment)
    assert "index" in found
    assert "lancedb" in found["index"].advice


def test_a_redis_that_evicts_is_reported(environment, queue):
    queue.redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        found = problems(environment)
    finally:
        queue.redis.config_set("maxmemory-policy", "noeviction")
    assert set(found) == {"redis"}
    assert "noeviction" in found["redis"].advice


def test_a_nearly_full_redis_is_reported_before_it_refuses_writes(environment, queue):
    used_bytes = queue.redis.info("memory")["used_memory"]
    queue.redis.config_set("maxmemory", int(used_bytes * 1.05))
    try:
        found = problems(environment)
    finally:
        queue.redis.config_set("maxmemory", 0)
    assert set(found) == {"redis"}
    assert "maxmemory" in found["redis"].advice


def test_dropped_entries_are_reported_until_the_others_are_discarded(
    environment, queue, monkeypatch
):
    monkeypatch.setattr(uploads, "MAX_DEAD", 2)
    for number in range(5):
        queue.dead_letter(b"?%d" % number, 1, "why")
    found = problems(environment)
    assert set(found) == {"redis"}
    assert "3 unreadable entries were dropped" in found["redis"].sentence
    assert "failed discard --reason unreadable" in found["redis"].advice
    for letter in queue.list_dead():
        queue.discard_dead(letter)
    assert not problems(environment)


def test_a_budget_without_a_price_is_reported_before_any_call(environment, httpserver):
    settings = remote(environment, httpserver) | {
        "IMAGEPIPELINE_TENANT_DAILY_BUDGETS_USD": '{"*": 5}',
        "IMAGEPIPELINE_VISION_MODEL": "mystery",
        "IMAGEPIPELINE_EMBEDDING_MODEL": "openai/text-embedding-3-small-2024-01-25",
    }
    httpserver.expect_request("/v1/embeddings").respond_with_json(answer_of([1.0, 2.0]))
    found = problems(settings)
    assert set(found) == {"prices", "vision model"}
    assert 'IMAGEPIPELINE_PRICES to {"mystery": [' in found["prices"].advice
    assert [request.path for request, _ in httpserver.log] == ["/v1/embeddings"]


def test_a_stack_that_does_not_run_is_reported(environment):
    found = examine_all(environment)
    assert {name for name, finding in found.items() if not finding.is_well} == STACK
    assert all("imagepipeline up" in found[name].advice for name in STACK)


def test_a_folder_without_a_stack_is_reported_and_nothing_is_created(tmp_path, environment):
    (tmp_path / "empty").mkdir()
    for home in (tmp_path / "empty", tmp_path / "none"):
        found = problems(environment | {"IMAGEPIPELINE_HOME": str(home)})
        assert {"database", "storage", "pauses"} <= found.keys()
        assert str(home) in found["database"].sentence
    assert list((tmp_path / "empty").iterdir()) == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o710])
def test_a_home_that_is_open_to_others_is_reported_with_advice(environment, tmp_path, mode):
    home = tmp_path / "home"
    home.chmod(mode)
    found = problems(environment)["home"]
    assert f"{home} is open to other users" in found.sentence
    assert f"chmod go= {home}" in found.advice
    assert home.stat().st_mode & 0o777 == mode  # unchanged


def test_a_redis_cluster_is_refused_everywhere_with_advice(environment, tmp_path):
    """This includes a cluster of one server, which only refuses commands with several keys."""
    for is_whole in (False, True):
        with redis_server("--cluster-enabled", "yes") as url, closing(UploadQueue(url)) as queue:
            if is_whole:
                queue.redis.execute_command("CLUSTER ADDSLOTSRANGE 0 16383")
                while queue.redis.cluster("INFO")["cluster_state"] != "ok":
                    time.sleep(0.05)
            clustered = environment | {"REDIS_URL": url}
            found = problems(clustered)["redis"]
            assert "runs as a cluster" in found.sentence
            assert "REDIS_URL" in found.advice
            for act in (queue.count, lambda: queue.dead_letter(b"x", 1, "why")):
                with pytest.raises(RedisClusterError, match="cluster-enabled no"):
                    act()
            with pytest.raises(RedisClusterError):
                services.check_redis(Settings.load(clustered))
    # A server that is down may start later.
    services.check_redis(Settings.load(environment | {"REDIS_URL": "redis://127.0.0.1:9"}))
