"""The catalogue keeps its guarantees on both SQLite and Postgres."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from imagepipeline.errors import (
    CatalogueDownError,
    CatalogueTakenError,
    ImageBusyError,
    PathTakenError,
    StackError,
    StaleClaimError,
)
from imagepipeline.models import (
    ASSETS,
    ImageMetadata,
    OriginalFacts,
    PaidCall,
    Recipe,
    Status,
    Upload,
    Variant,
    VariantSpec,
    build_variant_specs,
    place_variants,
)
from imagepipeline.stores import events, history, migrations
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.database import Database, create_sqlite_engine
from imagepipeline.stores.erasures import Erasures
from imagepipeline.stores.failures import FailedImages
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.migrations import VERSION_TABLE
from imagepipeline.stores.outbox import Outbox, withdraw_unsent
from imagepipeline.stores.reader import State
from imagepipeline.stores.retention import Retention
from imagepipeline.stores.tables import schema

VERSIONS = Path(migrations.__file__).parent / "versions"
NEWEST = max(path.name[:4] for path in VERSIONS.glob("0*.py"))
RECIPE = Recipe("local", "m")
ORIGINAL = OriginalFacts("original/a.jpg", 3, "0" * 64, 4, 3, "data:", "#aabbcc")
METADATA = ImageMetadata(
    description="d", tags=["t"], category="c", dominant_colors=["#aabbcc"], mood="m"
)
VARIANTS = [
    (f"variants/a-{suffix}.webp", Variant(VariantSpec(suffix, 9, "webp", 80), 9, 7, b"abc"))
    for suffix in ("sm", "md")
]


class Clock:
    def __init__(self):
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self):
        self.now += timedelta(seconds=1)
        return self.now


@pytest.fixture
def catalogue(catalogue_url):
    return Catalogue(catalogue_url, Clock())


@pytest.fixture
def outbox(catalogue_url):
    return Outbox(catalogue_url, Clock())


def make(catalogue, claim):
    """Writes all results of a run."""
    catalogue.save_original(claim, ORIGINAL)
    catalogue.save_metadata(claim, METADATA, Recipe("local", "m"), "0" * 64)
    catalogue.save_variants(claim, VARIANTS)
    for asset in ASSETS:
        catalogue.record_result(claim, asset, RECIPE, "0" * 64)


def test_migrations_create_the_tables_that_the_code_expects(bare_database_url):
    catalogue = Catalogue(bare_database_url)
    catalogue.migrate()
    catalogue.migrate()
    catalogue.check()
    with sa.create_engine(bare_database_url).connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "version_table": VERSION_TABLE}
        )
        assert compare_metadata(context, schema) == []


def make_tables_of_0_1_0(url):
    """Creates the tables of version 0.1.0 with two images, and its own version table."""
    config = Config()
    config.set_main_option("script_location", "imagepipeline.stores:migrations")
    with sa.create_engine(url).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0003")
        for image_id, path in (("a_b", "original/a_b.jpg"), ("axb", "original/a_b.png")):
            connection.execute(
                sa.text(
                    "INSERT INTO images (id, status, generation, fence, priority, attempts, path, "
                    "beat, accepted_at, updated_at) VALUES (:id, 'pending', 1, 0, 0, 0, :path, "
                    "0, '2026-01-01', '2026-01-01')"
                ),
                {"id": image_id, "path": path},
            )
        connection.exec_driver_sql(f"CREATE TABLE alembic_version AS SELECT * FROM {VERSION_TABLE}")
        connection.exec_driver_sql(f"DROP TABLE {VERSION_TABLE}")


def test_migrations_and_counts_of_all_images_may_take_minutes(postgres_catalogue_url, monkeypatch):
    limits = []

    def note(connection):
        limits.append(connection.exec_driver_sql("SHOW statement_timeout").scalar_one())

    monkeypatch.setattr(migrations, "upgrade", note)
    Catalogue(postgres_catalogue_url).migrate()
    for is_patient in (True, False):
        with Database(postgres_catalogue_url).reading(is_patient) as connection:
            note(connection)
    assert limits == ["0", "10min", "30s"]


def test_small_images_of_an_earlier_version_keep_their_files_and_are_published_once(
    bare_database_url,
):
    config = Config()
    config.set_main_option("script_location", "imagepipeline.stores:migrations")
    with sa.create_engine(bare_database_url).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0010")
        connection.exec_driver_sql(
            "INSERT INTO images (id, status, generation, fence, priority, attempts, beat, "
            "accepted_at, updated_at) VALUES ('a', 'completed', 1, 1, 0, 1, 1, '2026-01-01', "
            "'2026-01-01')"
        )
        connection.exec_driver_sql(
            "INSERT INTO image_results (image_id, asset, generation, provider, model, settings, "
            "input_sha256, made_at) VALUES ('a', 'variants', 1, 'local', 'pillow', '', 'x', "
            "'2026-01-01')"
        )
        for suffix, width in (("sm", 640), ("md", 700), ("lg", 700)):
            connection.exec_driver_sql(
                "INSERT INTO image_variants (id, image_id, width, height, format, path, size) "
                f"VALUES ('a-{suffix}-webp', 'a', {width}, 9, 'webp', 'variants/a-{suffix}.webp', "
                f"{width})"
            )
    catalogue = Catalogue(bare_database_url)
    catalogue.migrate()
    variants = catalogue.get("a")["variants"]
    assert {one["path"]: one["is_alias"] for one in variants} == {
        "variants/a-sm.webp": False,
        "variants/a-md.webp": False,
        "variants/a-lg.webp": True,
    }
    with sa.create_engine(bare_database_url).begin() as connection:
        published = connection.exec_driver_sql("SELECT path FROM published_variants_v1")
        assert sorted(published.scalars()) == ["variants/a-md.webp", "variants/a-sm.webp"]
        config.attributes["connection"] = connection
        command.downgrade(config, "0010")
        command.upgrade(config, "head")


def test_variants_of_an_image_share_a_path_and_others_cannot_take_it(catalogue_url):
    catalogue = Catalogue(catalogue_url)
    specs = build_variant_specs()[::2]
    for image_id in ("a", "b"):
        catalogue.accept([Upload(image_id)])
        claim = catalogue.claim(image_id, 1, "run")
        placed = place_variants(specs, 9, 7, "original/x.jpg")
        variants = [(placed[spec.id], Variant(spec, 9, 7, b"webp")) for spec in specs]
        assert {path for path, _ in variants} == {"variants/x-sm.webp"}
        if image_id == "a":
            catalogue.save_variants(claim, variants)
        else:
            with pytest.raises(PathTakenError):
                catalogue.save_variants(claim, variants)
    assert [one["is_alias"] for one in catalogue.get("a")["variants"]] == [True, True, False]
    free = catalogue.find_free_paths(["variants/x-sm.webp", "variants/x-lg.webp"])
    assert free == {"variants/x-lg.webp"}


def read_versions(url):
    with sa.create_engine(url).connect() as connection:
        tables = sa.inspect(connection).get_table_names()
        return {
            name: connection.exec_driver_sql(f"SELECT version_num FROM {name}").scalars().all()
            for name in ("alembic_version", VERSION_TABLE)
            if name in tables
        }


def test_tables_of_an_earlier_version_are_migrated_and_keep_its_version_table(bare_database_url):
    make_tables_of_0_1_0(bare_database_url)
    catalogue = Catalogue(bare_database_url)
    catalogue.migrate()
    assert read_versions(bare_database_url) == {
        "alembic_version": ["0003"],
        VERSION_TABLE: [NEWEST],
    }
    assert [catalogue.get(image_id)["requested_path"] for image_id in ("a_b", "axb")] == [
        None,
        "original/a_b.png",
    ]
    catalogue.migrate()
    catalogue.check()


def test_another_programs_version_table_is_left_alone(bare_database_url):
    with sa.create_engine(bare_database_url).begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"
        )
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('0003')")
    Catalogue(bare_database_url).migrate()
    Catalogue(bare_database_url).check()
    assert read_versions(bare_database_url) == {
        "alembic_version": ["0003"],
        VERSION_TABLE: [NEWEST],
    }


def test_tables_with_additions_of_a_newer_version_are_used_as_they_are(catalogue, catalogue_url):
    with sa.create_engine(catalogue_url).begin() as connection:
        connection.exec_driver_sql("ALTER TABLE images ADD COLUMN invented VARCHAR(9)")
        connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    catalogue.migrate()
    assert catalogue.accept([Upload("a")]) == {"a"}
    assert read_versions(catalogue_url)[VERSION_TABLE] == ["9999"]


def test_tables_with_columns_removed_by_a_newer_version_are_refused(catalogue, catalogue_url):
    with sa.create_engine(catalogue_url).begin() as connection:
        connection.exec_driver_sql("ALTER TABLE images DROP COLUMN discarded_at")
        connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(StackError, match=r"newer version \(9999\), without images\.discarded_at"):
        catalogue.migrate()


def test_compiled_statements_are_shared_by_all_sqlite_databases(tmp_path):
    def read(name):
        with create_sqlite_engine(f"sqlite:///{tmp_path / name}").connect() as connection:
            return connection.execute(
                sa.select(sa.literal(len(name)).label("of_this_test"))
            ).context.cache_hit.name

    assert [read("one"), read("two")] == ["CACHE_MISS", "CACHE_HIT"]


def test_a_database_without_tables_is_a_clear_error(bare_database_url):
    if bare_database_url.startswith("sqlite"):
        Path(sa.make_url(bare_database_url).database).touch()
    with pytest.raises(StackError, match="none of the catalogue's tables: run `imagepipeline mig"):
        Catalogue(bare_database_url).check()


def test_an_upload_is_pending_in_its_first_generation(catalogue):
    assert catalogue.accept([Upload("a", priority=3)]) == {"a"}
    row = catalogue.get("a")
    assert (row["status"], row["generation"], row["attempts"], row["priority"]) == (
        "pending",
        1,
        0,
        3,
    )
    assert row["updated_at"] == datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC)
    assert catalogue.count() == {"pending": 1, "processing": 0, "completed": 0, "failed": 0}
    assert catalogue.get("b") is None


def test_a_push_while_the_image_waits_is_part_of_the_next_run(catalogue):
    catalogue.accept([Upload("a", priority=3)])
    assert catalogue.accept([Upload("a", "original/x.jpg")]) == set()
    claim = catalogue.claim("a", 1, "run")
    assert claim.path == "original/x.jpg"
    make(catalogue, claim)
    assert catalogue.finish(claim) is Status.COMPLETED
    assert (catalogue.get("a")["generation"], catalogue.get("a")["priority"]) == (1, 3)


@pytest.mark.parametrize("pushes", [1, 3])
@pytest.mark.parametrize("ends", ["completed", "failed"])
def test_pushes_during_a_run_begin_one_more_generation_when_it_ends(
    catalogue, outbox, pushes, ends
):
    catalogue.accept([Upload("a")])
    claim = catalogue.claim("a", 1, "run")
    for number in range(pushes):
        assert catalogue.accept([Upload("a", f"original/{number}.jpg")]) == set()
    assert catalogue.get("a")["status"] == "processing"
    if ends == "completed":
        make(catalogue, claim)
        assert catalogue.finish(claim) is Status.PENDING
    else:
        catalogue.fail(claim, "corrupt", "cut off")
        assert outbox.list_unsent("webhook") == []  # the new generation may succeed
    row = catalogue.get("a")
    assert (row["status"], row["generation"], row["reason"], row["attempts"]) == (
        "pending",
        2,
        None,
        0,
    )
    assert ends in [event["event"] for event in row["history"]]
    following = catalogue.claim("a", 2, "run2")
    assert following.path == f"original/{pushes - 1}.jpg"
    make(catalogue, following)
    assert catalogue.finish(following) is Status.COMPLETED
    assert catalogue.get("a")["generation"] == 2


def test_a_push_during_a_run_that_is_handed_back_is_part_of_the_next_run(catalogue):
    catalogue.accept([Upload("a")])
    claim = catalogue.claim("a", 1, "run")
    catalogue.accept([Upload("a")])
    catalogue.hand_back(claim, "a stop")
    claim = catalogue.claim("a", 2, "run2")  # begins after the push
    make(catalogue, claim)
    assert catalogue.finish(claim) is Status.COMPLETED


def test_a_push_without_a_path_resets_an_earlier_path(catalogue):
    catalogue.accept([Upload("a", "original/x.jpg")])
    claim = catalogue.claim("a", 1, "run")
    make(catalogue, claim)
    catalogue.finish(claim)
    catalogue.accept([Upload("a")])
    claim = catalogue.claim("a", 2, "run2")
    assert (claim.path, claim.last_path) == (None, "original/a.jpg")


def test_an_image_with_results_of_two_originals_is_not_completed(catalogue):
    catalogue.accept([Upload("a")])
    claim = catalogue.claim("a", 1, "run")
    make(catalogue, claim)
    catalogue.save_original(claim, replace(ORIGINAL, original_sha256="1" * 64))
    catalogue.record_result(claim, "variants", RECIPE, "1" * 64)
    assert catalogue.finish(claim) is Status.PENDING
    assert "stale: metadata" in catalogue.get("a")["history"][-1]["detail"]


def test_a_catalogue_belongs_to_the_first_dagster_instance(catalogue):
    catalogue.bind("one")
    catalogue.bind("one")
    with pytest.raises(
        CatalogueTakenError, match=r"another Dagster instance \(one, since 2026.*--take-over"
    ):
        catalogue.bind("two")
    catalogue.bind("two", is_taken_over=True)
    with pytest.raises(CatalogueTakenError):
        catalogue.bind("one")


def test_a_push_after_the_end_begins_a_new_generation(catalogue):
    catalogue.accept([Upload("a")])
    catalogue.fail(catalogue.claim("a", 1, "run"), "corrupt", "cut off")
    assert catalogue.accept([Upload("a", "original/x.jpg")]) == {"a"}
    row = catalogue.get("a")
    assert (row["status"], row["generation"], row["reason"], row["error"]) == (
        "pending",
        2,
        None,
        None,
    )
    assert row["requested_path"] == "original/x.jpg"


def test_pending_images_are_sorted_by_priority_then_age(catalogue):
    catalogue.accept([Upload("old")])
    catalogue.accept([Upload("new")])
    catalogue.accept([Upload("urgent", priority=5)])
    catalogue.accept([Upload("bulk", priority=-5)])
    assert [image.image_id for image in catalogue.list_pending(10)] == [
        "urgent",
        "old",
        "new",
        "bulk",
    ]
    assert [image.image_id for image in catalogue.list_pending(2, except_for={("urgent", 1)})] == [
        "old",
        "new",
    ]
    assert len(catalogue.list_pending(10, except_for={("urgent", 2)})) == 4


def test_a_generation_is_claimed_by_one_run_only(catalogue):
    catalogue.accept([Upload("a")])
    claim = catalogue.claim("a", 1, "first")
    assert catalogue.claim("a", 1, "second") is None
    assert catalogue.claim("a", 1, "first") == claim
    assert catalogue.claim("a", 2, "third") is None
    assert catalogue.claim("b", 1, "fourth") is None


def test_only_one_of_many_simultaneous_runs_gets_the_claim(catalogue):
    for round_ in range(10):
        catalogue.accept([Upload(f"i{round_}")])
        with ThreadPoolExecutor(8) as pool:
            claims = list(pool.map(partial(catalogue.claim, f"i{round_}", 1), map(str, range(8))))
        assert len([claim for claim in claims if claim]) == 1


def test_an_image_is_completed_once_it_has_all_results(catalogue):
    catalogue.accept([Upload("a")])
    claim = catalogue.claim("a", 1, "run")
    make(catalogue, claim)
    assert catalogue.finish(claim) is Status.COMPLETED
    row = catalogue.get("a")
    assert row["status"] == "completed"
    assert row["metadata"] == METADATA.model_dump(by_alias=True)
    assert row["variants"][0] == {
        "id": "a-md-webp",
        "image_id": "a",
        "width": 9,
        "height": 7,
        "format": "webp",
        "path": "variants/a-md.webp",
        "size": 3,
        "is_alias": False,
        "recipe": None,
        "is_published": True,
    }
    assert row["made_by"]["embedding"]["version"] == "local:m"
    assert catalogue.get_states(["a", "b"]) == {"a": State(1, Status.COMPLETED, 1, 1)}


def test_an_image_without_all_results_goes_back_to_the_queue(catalogue):
    claim = catalogue.claim_anew("a", "run")
    catalogue.record_result(claim, "metadata", RECIPE, "0" * 64)
    assert catalogue.finish(claim) is Status.PENDING
    assert [(image.image_id, image.generation) for image in catalogue.list_pending(9)] == [("a", 2)]


def test_processing_an_image_again_replaces_its_results(catalogue):
    for _ in range(2):
        claim = catalogue.claim_anew("a", "run")
        make(catalogue, claim)
        catalogue.finish(claim)
    assert len(catalogue.get("a")["variants"]) == 2
    assert catalogue.get("a")["generation"] == 2


def test_the_path_of_another_images_original_is_refused(catalogue):
    make(catalogue, catalogue.claim_anew("a", "run"))
    other = catalogue.claim_anew("b", "run2")
    with pytest.raises(PathTakenError, match=r"variants/a-sm\.webp"):
        catalogue.save_variants(other, VARIANTS)
    assert len(catalogue.get("a")["variants"]) == 2


def test_a_stale_claim_can_change_nothing(catalogue):
    catalogue.accept([Upload("a")])
    stale = catalogue.claim("a", 1, "dead run")
    catalogue.hand_back(stale, "x")
    fresh = catalogue.claim("a", 2, "successor")
    before = catalogue.get("a")
    for write in (
        lambda: make(catalogue, stale),
        lambda: catalogue.save_variants(stale, VARIANTS),
        lambda: catalogue.record_result(stale, "embedding", RECIPE, "0" * 64),
        lambda: catalogue.record_attempt(stale, 3),
        lambda: catalogue.finish(stale),
        lambda: catalogue.fail(stale, "corrupt", "late"),
        lambda: catalogue.hand_back(stale, "x"),
    ):
        with pytest.raises(StaleClaimError):
            write()
    assert catalogue.get("a") == before
    assert fresh.fence > stale.fence


def test_a_manual_run_claims_an_image_in_any_status_unless_another_run_has_it(catalogue):
    assert catalogue.claim_anew("a", "r1").generation == 1  # unknown
    with pytest.raises(ImageBusyError, match="r1"):
        catalogue.claim_anew("a", "r2")
    claim = catalogue.claim_anew("a", "r1")  # its own
    catalogue.fail(claim, "corrupt", "x" * 1000)
    assert len(catalogue.get("a")["error"]) == 300
    assert catalogue.claim_anew("a", "r3").generation == 2  # failed
    catalogue.accept([Upload("b")])
    assert catalogue.claim_anew("b", "r4").generation == 1  # pending


def test_attempts_are_the_maximum_over_the_assets(catalogue):
    claim = catalogue.claim_anew("a", "run")
    for attempt in (1, 2, 1):
        catalogue.record_attempt(claim, attempt)
    assert catalogue.get("a")["attempts"] == 2


def test_a_catalogue_that_is_down_postpones_without_showing_its_password(tmp_path):
    down = Catalogue("postgresql://user:canary@127.0.0.1:9/db")
    for call in (down.count, lambda: down.accept([Upload("a")]), lambda: down.claim("a", 1, "run")):
        with pytest.raises(CatalogueDownError, match="does not answer") as caught:
            call()
        assert "canary" not in str(caught.value)
        assert caught.value.__suppress_context__  # not in a traceback either


@pytest.mark.parametrize("kind", [psycopg2.OperationalError, psycopg2.DatabaseError])
def test_a_server_that_dies_in_a_statement_does_not_answer(postgres_catalogue_url, kind):
    """As in a soak with crashes of Postgres; which of its errors psycopg2 raises is a race."""
    catalogue = Catalogue(postgres_catalogue_url)
    engine = catalogue._database.engine

    def die(*_):
        raise kind("server closed the connection unexpectedly")

    sa.event.listen(engine, "do_execute", die)
    try:
        with pytest.raises(CatalogueDownError, match=kind.__name__):
            catalogue.accept([Upload("a")])
    finally:
        sa.event.remove(engine, "do_execute", die)
    assert catalogue.accept([Upload("a")]) == {"a"}


def test_the_catalogue_reconnects_after_the_database_restarts(postgres_url, postgres_catalogue_url):
    catalogue = Catalogue(postgres_catalogue_url)
    catalogue.accept([Upload("a")])
    with sa.create_engine(postgres_url).connect() as admin:
        name = sa.make_url(postgres_catalogue_url).database
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
        assert admin.execute(sa.text(ended), {"name": name}).all()
    assert catalogue.count()["pending"] == 1


IMPOSSIBLE = ["{", "[" * 100_000, "1" * 10_000, "[1]", "7", '"text"', '{"a": ' * 50_000]


@pytest.mark.parametrize("text", IMPOSSIBLE, ids=range(len(IMPOSSIBLE)))
def test_invalid_json_in_a_row_affects_only_the_metadata_of_that_row(sqlite_catalogue_url, text):
    catalogue = Catalogue(sqlite_catalogue_url)
    for image_id in ("bad", "good"):
        catalogue.fail(catalogue.claim_anew(image_id, "run"), "corrupt", "cut off")
    with sa.create_engine(sqlite_catalogue_url).begin() as connection:
        connection.execute(
            sa.text("UPDATE images SET metadata = :text WHERE id = 'bad'"), {"text": text}
        )
    assert catalogue.get("bad")["metadata"] is None
    assert {row["id"] for row in catalogue.list_ended(Status.FAILED)} == {"bad", "good"}
    assert {row["id"] for row in FailedImages(sqlite_catalogue_url).iterate()} == {"bad", "good"}


@pytest.mark.parametrize("text", ["\x1b[31m\n\u202e\x7f", "half \ud83d", "nothing \x00"])
def test_any_text_can_be_stored_and_becomes_printable(catalogue_url, text):
    catalogue = Catalogue(catalogue_url)
    claim = catalogue.claim_anew("a", "run")
    catalogue.record_failure(claim, "metadata", 1, 1, text)
    catalogue.fail(claim, "unexpected", text * 300)
    row = catalogue.get("a")
    assert row["error"].isprintable()
    assert len(row["error"]) == 300
    assert all((event["detail"] or "").isprintable() for event in row["history"])
    outbox = Outbox(catalogue_url)
    assert outbox.list_unsent("mail")[0]["error"].isprintable()
    ledger = Ledger(catalogue_url)
    ledger.pause("auth", text, 60)
    assert ledger.list_pauses()[0].message.isprintable()
    ledger.close()
    catalogue.close()


def test_an_original_belongs_to_the_image_that_named_it_first(catalogue_url):
    catalogue = Catalogue(catalogue_url)
    catalogue.accept(
        [Upload("a", "original/2026/x.jpg"), Upload("b"), Upload("c", "original/b.png")]
    )
    uploads = [
        Upload("a", "original/2026/x.jpg"),
        Upload("d", "original/2026/x.jpg"),
        Upload("d", "original/b.gif"),
        Upload("b", "original/b.png"),
        Upload("d", "original/2026/y.jpg"),
        Upload("e", "original/2026/y.jpg"),
        Upload("e"),
        Upload("f", "original/f.jpg"),
    ]
    assert catalogue.find_owners(dict(enumerate(uploads))) == {1: "a", 2: "b", 5: "d"}
    claim = catalogue.claim("c", 1, "run")
    with pytest.raises(PathTakenError, match=r"original/b\.png is the original of b, not of c"):
        catalogue.check_path(claim, "original/b.png")
    catalogue.check_path(claim, "original/c.png")
    catalogue.close()


def test_reads_do_not_wait_for_a_writer(catalogue, catalogue_url):
    catalogue.accept([Upload("cat")])
    with Database(catalogue_url).transaction() as connection:
        connection.exec_driver_sql("UPDATE images SET priority = 7")
        with ThreadPoolExecutor() as pool:  # a read of its own connection sees the last commit
            assert pool.submit(catalogue.get, "cat").result(timeout=20)["priority"] == 0


@pytest.mark.parametrize("accept", [Catalogue.accept, Catalogue.accept_imported])
def test_a_push_during_an_erasure_goes_on_from_its_numbers(
    catalogue, catalogue_url, accept, monkeypatch
):
    catalogue.accept([Upload("b"), Upload("a")])
    catalogue.cancel("a", "it is being erased")
    fence = catalogue.get("a")["fence"]
    finish, is_about_to_end = events.replace_by_erased, threading.Event()

    def finish_late(*arguments):
        is_about_to_end.set()
        time.sleep(1)  # the push waits for the erasure meanwhile
        return finish(*arguments)

    monkeypatch.setattr(events, "replace_by_erased", finish_late)
    with ThreadPoolExecutor() as pool:
        erasure = pool.submit(Erasures(catalogue_url, Clock()).remove, "a", fence, [])
        assert is_about_to_end.wait(20)
        accept(catalogue, [Upload("b"), Upload("a")])
        assert erasure.result()["images"] == 1
    row = catalogue.get("a")
    assert (row["status"], row["generation"], row["fence"]) == ("pending", 2, fence)


def test_an_image_that_came_after_a_backup_gets_a_fence_above_those_it_had(
    catalogue, catalogue_url
):
    catalogue.accept([Upload("in-the-backup")])
    with sa.create_engine(catalogue_url).begin() as connection:  # as docs/operations.md says
        connection.exec_driver_sql("UPDATE images SET fence = fence + 1000000")
    catalogue.claim("in-the-backup", 1, "run")
    catalogue.accept([Upload("later")])
    assert catalogue.claim("later", 1, "run").fence == 1_000_001
    assert catalogue.claim_anew("by-a-person", "run").fence == 1_000_001
    catalogue.accept_imported([Upload("imported")])
    assert catalogue.claim("imported", 1, "run").fence == 1_000_001


def test_an_unknown_image_that_is_pushed_and_started_by_a_person_at_once_is_claimed(
    postgres_catalogue_url,
):
    catalogue = Catalogue(postgres_catalogue_url)
    with (
        ThreadPoolExecutor() as pool,
        sa.create_engine(postgres_catalogue_url).begin() as push,
    ):
        push.exec_driver_sql(
            "INSERT INTO images (id, status, generation, fence, priority, attempts, beat, "
            "accepted_at, updated_at) VALUES ('a', 'pending', 1, 0, 0, 0, 0, now(), now())"
        )
        claimed = pool.submit(catalogue.claim_anew, "a", "run")
        time.sleep(0.5)
        push.commit()
        assert claimed.result().fence == 1
    catalogue.close()


def test_calls_that_accept_the_same_images_do_not_lock_each_other_out(postgres_catalogue_url):
    catalogue, gates = Catalogue(postgres_catalogue_url), threading.local()
    engine = Database(postgres_catalogue_url).engine

    def stop_at_gate(connection, cursor, statement, parameters, context, is_many):
        if statement.startswith("INSERT INTO images") and (own := vars(gates).pop("own", None)):
            own.wait(60)  # it is here
            own.wait(60)  # it may go on

    def accept(gate, *names):
        gates.own = gate
        return catalogue.accept([Upload(name) for name in names])

    def await_a_lock_or(is_over):
        with engine.connect() as connection:
            lock = sa.text("SELECT 1 FROM pg_locks WHERE NOT granted")
            while not (is_over() or connection.execute(lock).first()):
                pass

    sa.event.listen(engine, "before_cursor_execute", stop_at_gate)
    gate, later_gate = threading.Barrier(2), threading.Barrier(2)
    with ThreadPoolExecutor(3) as pool:
        accepted = [pool.submit(accept, gate, "a", "b")]
        gate.wait(60)  # it has found neither image
        between = pool.submit(catalogue.accept, [Upload("b")])
        await_a_lock_or(between.done)
        accepted.append(pool.submit(accept, later_gate, "a", "b"))
        if is_at_once := between.done():
            later_gate.wait(60)  # it has found and locked b
        gate.wait(60)
        if is_at_once:
            await_a_lock_or(accepted[0].done)  # a is inserted, and b waits
        else:
            later_gate.wait(60)
        later_gate.wait(60)
        begun = [one.result(60) for one in (*accepted, between)]
    assert begun == [{"a", "b"}, set(), set()]
    sa.event.remove(engine, "before_cursor_execute", stop_at_gate)
    catalogue.close()


def test_calls_are_pruned_while_their_image_is_erased(postgres_catalogue_url):
    """Both lock the image first; otherwise, Postgres would end one of them."""
    catalogue = Catalogue(postgres_catalogue_url)
    catalogue.accept([Upload("a")])
    Ledger(postgres_catalogue_url).record(
        PaidCall("a", 1, "metadata", "p", "m", "answered", 9, 1, 0.5, 1, 0)
    )
    retention = Retention(postgres_catalogue_url)
    with (
        ThreadPoolExecutor() as pool,
        sa.create_engine(postgres_catalogue_url).begin() as erasure,
    ):
        erasure.exec_driver_sql("SELECT id FROM images WHERE id = 'a' FOR UPDATE")
        pruned = pool.submit(retention.prune_calls, datetime.now(UTC) + timedelta(days=1), 9)
        time.sleep(0.5)
        erasure.exec_driver_sql("UPDATE provider_calls SET image_id = NULL WHERE image_id = 'a'")
        erasure.commit()
        assert pruned.result() == 1
    assert catalogue.sum_cost_usd("a") is None
    catalogue.close()


def test_of_a_long_history_the_latest_lines_are_read(catalogue, monkeypatch):
    monkeypatch.setattr(history, "MAX_READ", 2)
    for number in range(3):
        catalogue.accept([Upload("a")])
        catalogue.fail(catalogue.claim("a", number + 1, f"run-{number}"), "poison", "it kills")
    lines = catalogue.get("a")["history"]
    assert [(line["event"], line["run_id"]) for line in lines] == [
        ("claimed", "run-2"),
        ("failed", "run-2"),
    ]


def test_failures_are_reopened_before_they_are_pushed_or_not_at_all(
    catalogue, catalogue_url, monkeypatch
):
    for image_id in "ab":
        catalogue.accept([Upload(image_id)])
        catalogue.fail(catalogue.claim(image_id, 1, "run"), "provider_unavailable", "down")
    pushes = []

    def push():
        other = Catalogue(catalogue_url, Clock())
        other.accept([Upload("b")])
        return other.claim("b", 2, "living run")

    def withdraw_late(connection, image_id):
        if image_id == "a":
            pushes.append(pool.submit(push))
            time.sleep(1)  # time for a push and a claim
        withdraw_unsent(connection, image_id)

    monkeypatch.setattr("imagepipeline.stores.outbox.withdraw_unsent", withdraw_late)
    with ThreadPoolExecutor() as pool:
        assert catalogue.reopen("provider_unavailable", datetime(2026, 1, 1, tzinfo=UTC)) == 2
    assert catalogue.holds(pushes[0].result())  # a run that has claimed the image keeps it
    assert [line["event"] for line in catalogue.get("b")["history"]] == [
        *("accepted", "claimed", "failed"),
        *("reopened", "claimed"),
    ]


def test_a_pending_image_fails_in_one_step(catalogue, monkeypatch):
    catalogue.accept([Upload("a")])
    [pending] = catalogue.list_pending(1)

    def die(*_):
        raise RuntimeError("the process is killed here")

    with monkeypatch.context() as patch:
        patch.setattr("imagepipeline.stores.outbox.add", die)
        with pytest.raises(RuntimeError):
            catalogue.fail_pending(pending, "cancelled", "by a person")
    assert catalogue.get("a")["status"] == "pending"
    assert catalogue.fail_pending(pending, "cancelled", "by a person")
    assert not catalogue.fail_pending(pending, "cancelled", "by a person")
    assert catalogue.get("a")["status"] == "failed"


def test_a_description_is_of_the_picture_that_was_asked_about(catalogue):
    def describe(text, input_sha256):
        claim = catalogue.claim_anew("twin", f"run for {text}")
        said = METADATA.model_copy(update={"description": text})
        catalogue.save_metadata(claim, said, RECIPE, input_sha256)
        catalogue.hand_back(claim, "it has been described")

    def replace(_):  # as soon as a transaction has read something
        describe("another picture", "2" * 64)

    describe("a cat", "1" * 64)
    sa.event.listen(catalogue._database.engine, "commit", replace, once=True)
    found = catalogue.find_twin_metadata(RECIPE, "1" * 64)
    assert found.description == "a cat"
    assert catalogue.find_twin_metadata(RECIPE, "1" * 64) is None
    assert catalogue.find_twin_metadata(RECIPE, "2" * 64).description == "another picture"


def test_a_description_of_an_earlier_kind_is_passed_over(catalogue):
    images = schema.tables["images"]
    for image_id in "ab":
        catalogue.accept([Upload(image_id)])
        claim = catalogue.claim(image_id, 1, "run")
        catalogue.save_metadata(claim, METADATA, RECIPE, "1" * 64)
    with catalogue._database.transaction() as connection:
        connection.execute(sa.update(images).where(images.c.id == "a").values(metadata={"x": 1}))
    assert catalogue.find_twin_metadata(RECIPE, "1" * 64) == METADATA
