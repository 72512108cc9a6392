"""Services are prepared in the same way wherever they run, and tables are created once."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa
import yaml

from imagepipeline.defs.sensors import find_slots
from imagepipeline.errors import StackError
from imagepipeline.runtime import services
from imagepipeline.settings import Settings
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline_tests.conftest import postgres_database


def migrate(environment):
    command = [sys.executable, "-m", "imagepipeline.cli", "migrate", "--json"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.stack
def test_tables_are_created_once_by_simultaneous_migrations(postgres_url, tmp_path):
    with (
        postgres_database(postgres_url) as catalogue_url,
        postgres_database(postgres_url) as dagster_url,
    ):
        urls = {"DATABASE_URL": catalogue_url, "DAGSTER_DATABASE_URL": dagster_url}
        asked = [
            migrate(os.environ | urls | {"IMAGEPIPELINE_HOME": str(tmp_path / str(n))})
            for n in range(3)
        ]
        for process in asked:
            output, error = process.communicate()
            assert process.returncode == 0, error
            assert json.loads(output)["databases"] == {
                "catalogue": "Postgres",
                "dagster": "Postgres",
            }
        with closing(Catalogue(catalogue_url)) as catalogue:
            catalogue.check()
        with sa.create_engine(dagster_url).connect() as connection:
            assert (
                connection.exec_driver_sql("SELECT count(*) FROM alembic_version").scalar_one() == 1
            )
            assert connection.exec_driver_sql("SELECT count(*) FROM runs").scalar_one() == 0


@pytest.mark.stack
def test_a_command_imports_nothing_from_the_current_folder(tmp_path):
    (tmp_path / "imagepipeline.py").write_text("raise RuntimeError('from the current folder')")
    command = [Path(sys.executable).parent / "imagepipeline", "migrate", "--json"]
    environment = os.environ | {"IMAGEPIPELINE_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["databases"]["catalogue"] == "SQLite"


@pytest.mark.stack
def test_a_second_dagster_on_the_same_catalogue_is_refused(sqlite_catalogue_url, tmp_path):
    """The catalogue's own tests refuse it on Postgres, too."""

    def call(home, *arguments):
        environment = os.environ | {
            "DATABASE_URL": sqlite_catalogue_url,
            "IMAGEPIPELINE_HOME": str(tmp_path / home),
        }
        command = [sys.executable, "-m", "imagepipeline.cli", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    assert call("first", "migrate") == (0, "")
    assert call("first", "migrate") == (0, "")
    for command in (["migrate"], ["service", "code-server"], ["up"]):
        code, error = call("second", *command)
        assert code != 0
        assert "belongs to another Dagster instance" in error.splitlines()[-1]
        assert "Traceback" not in error
    assert call("second", "migrate", "--take-over") == (0, "")
    assert "another Dagster instance" in call("first", "migrate")[1]


@pytest.mark.stack
@pytest.mark.parametrize("database", ["DATABASE_URL", "DAGSTER_DATABASE_URL"])
def test_a_missing_database_is_named_without_its_address(tmp_path, monkeypatch, database):
    monkeypatch.setenv("IMAGEPIPELINE_HOME", str(tmp_path))
    monkeypatch.setenv(database, "postgresql://u:canary@127.0.0.1:1/d")
    with pytest.raises(StackError, match="tables could not be created") as caught:
        services.migrate(Settings.load())
    assert "canary" not in str(caught.value)


def test_dagsters_files_follow_the_settings(tmp_path):
    settings = {"IMAGEPIPELINE_HOME": str(tmp_path), "IMAGEPIPELINE_MAX_RUNS": "7"}
    on_postgres = Settings.load(settings | {"DAGSTER_DATABASE_URL": "postgres://u:canary@h/d"})
    services.prepare(on_postgres)
    written = (tmp_path / "dagster" / "dagster.yaml").read_text()
    config = yaml.safe_load(written)
    assert config["concurrency"]["runs"]["max_concurrent_runs"] == 7
    assert config["storage"]["custom"]["config"] == {
        "postgres_url": {"env": "DAGSTER_DATABASE_URL"}
    }
    assert (
        services.build_environment(on_postgres, "daemon")["DAGSTER_DATABASE_URL"]
        == "postgresql+psycopg2://u:canary@h/d"
    )
    assert "canary" not in written
    services.prepare(Settings.load(settings))
    with dg.DagsterInstance.from_config(str(tmp_path / "dagster")) as instance:
        assert find_slots(instance) == 7


@pytest.mark.stack
def test_each_process_is_given_only_the_secrets_it_needs(tmp_path, monkeypatch):
    secrets = ("OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "IMAGEPIPELINE_SMTP_URL", "OTHER_TOKEN")
    monkeypatch.setenv("IMAGEPIPELINE_HOME", str(tmp_path))
    monkeypatch.setenv("IMAGEPIPELINE_MAIL_TO", "operator@example.com")
    for name in secrets:
        monkeypatch.setenv(name, "canary")
    settings = Settings.load()
    environments = {
        name: services.build_environment(settings, name) for name in services.SECRETS_OF
    }
    held = {
        name: {secret for secret in secrets if secret in environment}
        for name, environment in environments.items()
    }
    assert held == {name: set() for name in services.SECRETS_OF} | {
        "worker": {"OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"},
        "resident": {"AWS_SECRET_ACCESS_KEY"},
        "erasure": {"AWS_SECRET_ACCESS_KEY"},
        "code-server": {"IMAGEPIPELINE_SMTP_URL"},
        "pruning": {"IMAGEPIPELINE_SMTP_URL"},  # it knows thereby which notices are owed
    }


def test_a_service_that_does_not_answer_is_unhealthy(tmp_path):
    settings = Settings.load(
        {"IMAGEPIPELINE_HOME": str(tmp_path), "IMAGEPIPELINE_WEBSERVER_PORT": "1"}
    )
    assert not any(services.is_healthy(settings, name) for name in services.NAMES)


def test_health_checks_bypass_the_proxy(httpserver, monkeypatch):
    httpserver.expect_request("/server_info").respond_with_json({})
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    assert services.answers_http(httpserver.url_for("/server_info"))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:3000"),
        ("::", "http://[::1]:3000"),
        ("10.0.0.9", "http://10.0.0.9:3000"),
    ],
)
def test_health_checks_use_an_address_on_which_the_webserver_listens(host, url):
    assert (
        services.build_webserver_url(Settings.load({"IMAGEPIPELINE_WEBSERVER_HOST": host})) == url
    )


def test_a_home_that_cannot_be_created_is_reported_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    for home in (tmp_path / "file", tmp_path / "file" / "home"):
        with pytest.raises(
            StackError, match=r"cannot be used as the home .* set IMAGEPIPELINE_HOME"
        ) as caught:
            services.prepare(Settings.load({"IMAGEPIPELINE_HOME": str(home)}))
        assert str(home) in str(caught.value)
