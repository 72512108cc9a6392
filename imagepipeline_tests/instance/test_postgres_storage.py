"""Dagster's storages in Postgres share one engine, which needs private names of Dagster."""

import inspect

import pytest
import sqlalchemy as sa

from imagepipeline.instance.postgres_storage import PooledPostgresStorage

pytestmark = pytest.mark.stack


@pytest.fixture
def storage(dagster_postgres_url):
    storage = PooledPostgresStorage(dagster_postgres_url)
    yield storage
    vars(storage.run_storage)["_engine"].dispose()


def test_a_process_has_one_connection_for_all_storages_and_instances(storage, dagster_postgres_url):
    for one in (storage, PooledPostgresStorage(dagster_postgres_url)):
        one.run_storage.get_runs_count()
        one.event_log_storage.get_maximum_record_id()
        one.schedule_storage.all_instigator_state()
    engine = sa.create_engine(dagster_postgres_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        name = sa.make_url(dagster_postgres_url).database
        count = sa.text("SELECT count(*) FROM pg_stat_activity WHERE datname = :name")
        assert connection.execute(count, {"name": name}).scalar_one() == 2  # theirs, and this one
    engine.dispose()


@pytest.mark.parametrize("name", ["run_storage", "event_log_storage", "schedule_storage"])
def test_dagster_still_keeps_its_engine_under_the_name_we_set(storage, name):
    assert "self._engine" in inspect.getsource(type(getattr(storage, name)).__init__)
