"""Every setting is checked at start-up, and an error names the setting."""

import json
import os

import pytest
from click.testing import CliRunner

from imagepipeline import cli
from imagepipeline.errors import SettingsError
from imagepipeline.settings import Settings, is_secret


def test_no_setting_is_required(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = Settings.load({})
    assert settings.home == tmp_path / ".imagepipeline"
    assert settings.has_own_redis
    assert settings.database_url == f"sqlite:///{tmp_path}/.imagepipeline/catalogue.sqlite"
    assert settings.storage == str(tmp_path / ".imagepipeline" / "storage")


def test_an_empty_variable_counts_as_unset():
    assert Settings.load({"REDIS_URL": "", "OPENAI_API_KEY": ""}) == Settings.load({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_URL", "http://h:1"),
        ("REDIS_PORT", "six"),
        ("REDIS_PORT", "70000"),
        ("DATABASE_URL", "mysql://user:secret@h/db"),
        ("OPENAI_BASE_URL", "api.openai.com"),
        ("OPENROUTER_BASE_URL", "file:///x"),
        ("IMAGEPIPELINE_QUEUE_PREFIX", "a b"),
        ("IMAGEPIPELINE_WEBSERVER_PORT", "0"),
    ],
)
def test_an_error_names_a_malformed_setting_but_hides_its_value(name, value):
    with pytest.raises(SettingsError) as caught:
        Settings.load({name: value})
    assert name in str(caught.value)
    assert value not in str(caught.value)


@pytest.mark.parametrize("name", ["TENANT_MAX_RUNS", "TENANT_DAILY_BUDGETS_USD"])
def test_a_limit_for_a_name_that_no_tenant_can_have_is_refused(name):
    with pytest.raises(SettingsError, match=f"IMAGEPIPELINE_{name}.*is not a tenant"):
        Settings.load({f"IMAGEPIPELINE_{name}": '{"*": 1, "acme corp": 5}'})
    assert Settings.load({f"IMAGEPIPELINE_{name}": '{"*": 1, "acme": 5}'})


@pytest.mark.parametrize("usd", ["Infinity", "NaN", "1e308", "-1"])
def test_a_budget_or_price_that_nobody_could_mean_is_refused(usd):
    for name, value in {
        "DAILY_BUDGET_USD": usd,
        "MONTHLY_BUDGET_USD": usd,
        "TENANT_DAILY_BUDGETS_USD": f'{{"acme": {usd}}}',
        "PRICES": f'{{"m": [{usd}, 0]}}',
    }.items():
        with pytest.raises(SettingsError, match=f"IMAGEPIPELINE_{name}"):
            Settings.load({f"IMAGEPIPELINE_{name}": value})


def test_one_error_names_all_malformed_settings():
    with pytest.raises(SettingsError, match=r"REDIS_PORT.*OPENAI_BASE_URL"):
        Settings.load({"REDIS_PORT": "x", "OPENAI_BASE_URL": "y"})


def test_the_error_for_a_misspelt_setting_suggests_the_right_name():
    with pytest.raises(SettingsError, match="did you mean IMAGEPIPELINE_VISION_MODEL"):
        Settings.load({"IMAGEPIPELINE_VISON_MODEL": "gpt-4o"})


def test_redis_is_given_by_url_or_by_host_not_both():
    with pytest.raises(SettingsError, match="REDIS_HOST"):
        Settings.load({"REDIS_URL": "redis://h", "REDIS_HOST": "h"})


def test_redis_may_be_given_by_host_and_port():
    assert Settings.load({"REDIS_HOST": "h"}).redis_url == "redis://h:6379/0"
    assert Settings.load({"REDIS_PORT": "7"}).redis_url == "redis://127.0.0.1:7/0"
    assert not Settings.load({"REDIS_HOST": "h"}).has_own_redis


def test_secrets_are_not_printed():
    settings = Settings.load(
        {
            "REDIS_URL": "redis://:canary@h",
            "DATABASE_URL": "postgresql://u:canary@h/d",
            "OPENAI_API_KEY": "canary",
        }
    )
    assert "canary" not in repr(settings)
    assert settings.redis_url == "redis://:canary@h"


def test_socket_paths_are_short_enough_wherever_the_home_is(tmp_path):
    deep = tmp_path / ("x" * 200)
    first, second = (
        Settings.load({"IMAGEPIPELINE_HOME": str(deep / name)}).socket_folder for name in "ab"
    )
    assert len(str(first / "valkey.sock")) < 100
    assert first != second


@pytest.fixture
def secret_file(tmp_path):
    def write(text):
        (tmp_path / "secret").write_text(text)
        return str(tmp_path / "secret")

    return write


def test_a_secret_may_be_read_from_a_file(secret_file):
    settings = Settings.load({"DATABASE_URL_FILE": secret_file("postgresql://u:canary@h/d\n")})
    assert settings.database_url == "postgresql://u:canary@h/d"


def test_a_secret_from_a_file_is_put_into_the_environment(secret_file, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY_FILE", secret_file("canary\n"))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    for _ in range(2):  # a child process loads the settings again
        Settings.load()
        assert os.environ.pop("AWS_SECRET_ACCESS_KEY_FILE", None) is None
        assert os.environ["AWS_SECRET_ACCESS_KEY"] == "canary"
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


def test_an_empty_file_means_no_key_but_is_refused_for_a_database(secret_file):
    assert Settings.load({"OPENAI_API_KEY_FILE": secret_file("\n")}).openai_api_key is None
    with pytest.raises(SettingsError, match=r"DATABASE_URL_FILE names .*, which is empty"):
        Settings.load({"DATABASE_URL_FILE": secret_file("\n")})


def test_a_secret_is_given_once_and_its_file_must_be_readable(secret_file):
    with pytest.raises(SettingsError, match="REDIS_URL and REDIS_URL_FILE exclude each other"):
        Settings.load({"REDIS_URL": "redis://h", "REDIS_URL_FILE": secret_file("redis://h")})
    with pytest.raises(
        SettingsError, match="OPENAI_API_KEY_FILE names /nowhere, which cannot be read"
    ):
        Settings.load({"OPENAI_API_KEY_FILE": "/nowhere"})
    with pytest.raises(SettingsError, match="IMAGEPIPELINE_HOME_FILE is not a setting"):
        Settings.load({"IMAGEPIPELINE_HOME_FILE": "/nowhere"})


def test_dagsters_database_url_names_the_installed_driver():
    url = Settings.load({"DAGSTER_DATABASE_URL": "postgres://u:p@h/d"}).dagster_database_url
    assert url.get_secret_value() == "postgresql+psycopg2://u:p@h/d"


def test_dagster_and_the_catalogue_do_not_share_a_database():
    for url in ("postgresql://u:p@h/d", "postgresql+psycopg2://v:q@h/d"):
        with pytest.raises(SettingsError, match="two databases"):
            Settings.load({"DATABASE_URL": "postgres://u:p@h/d", "DAGSTER_DATABASE_URL": url})


def test_the_storage_root_is_a_folder_or_a_bucket_which_also_holds_the_index(tmp_path):
    bucket = Settings.load({"IMAGEPIPELINE_STORAGE_ROOT": "s3://bucket/prefix/"})
    assert (bucket.storage, bucket.index_uri) == (
        "s3://bucket/prefix",
        "s3://bucket/prefix/lancedb",
    )
    folder = Settings.load(
        {"IMAGEPIPELINE_STORAGE_ROOT": f"file://{tmp_path}", "IMAGEPIPELINE_HOME": "/h"}
    )
    assert (folder.storage, folder.index_uri) == (str(tmp_path), "/h/lancedb")


LINKS = {
    "REDIS_PORT": "tcp://10.0.0.1:6379",
    "REDIS_SERVICE_HOST": "10.0.0.1",
    "REDIS_SERVICE_PORT": "6379",
    "REDIS_PORT_6379_TCP": "tcp://10.0.0.1:6379",
    "REDIS_PORT_6379_TCP_ADDR": "10.0.0.1",
    "IMAGEPIPELINE_PORT": "tcp://[fd00::1]:8080",
    "IMAGEPIPELINE_SERVICE_PORT_HTTP": "8080",
    "IMAGEPIPELINE_PORT_8080_UDP_PROTO": "udp",
    "IMAGEPIPELINE_WEBSERVER_PORT": "tcp://10.0.0.2:3000",
    "IMAGEPIPELINE_WEBSERVER_SERVICE_HOST": "10.0.0.2",
    "IMAGEPIPELINE_CODE_SERVER_PORT": "tcp://10.0.0.3:4000",
}


def test_service_variables_of_kubernetes_are_not_taken_as_settings():
    assert Settings.load(LINKS) == Settings.load({})
    assert Settings.load(LINKS | {"REDIS_HOST": "h"}).redis_url == "redis://h:6379/0"


def test_child_processes_do_not_get_service_variables(monkeypatch):
    for name, value in (
        LINKS | {"DAGSTER_GRPC_PORT": "tcp://10.0.0.4:1", "OTHER_PORT": "tcp://h:1"}
    ).items():
        monkeypatch.setenv(name, value)
    left = Settings.load().build_environment()
    assert not left.keys() & (LINKS.keys() | {"DAGSTER_GRPC_PORT"})
    assert left["OTHER_PORT"] == "tcp://h:1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_PORT", "tcp://h"),
        ("REDIS_PORT", "http://h:1"),
        ("REDIS_URL", "tcp://h:6379"),
        ("IMAGEPIPELINE_WEBSERVER_PROT", "3001"),
        ("IMAGEPIPELINE_PORT", "3001"),
        ("IMAGEPIPELINE_WEBSERVER_HOTS", "tcp://h:1"),
    ],
)
def test_a_setting_that_resembles_a_service_variable_is_refused(name, value):
    with pytest.raises(SettingsError, match=name):
        Settings.load({name: value})


def test_no_proxy_is_used_for_this_machine(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "intranet, 127.0.0.1")
    monkeypatch.setenv("no_proxy", ".example")
    Settings.load()
    assert (
        os.environ["NO_PROXY"]
        == os.environ["no_proxy"]
        == "intranet,127.0.0.1,.example,localhost,::1"
    )
    monkeypatch.setenv("no_proxy", "*")
    Settings.load()
    assert os.environ["NO_PROXY"] == "*"


def test_a_home_may_have_any_name_without_question_mark_or_line_break():
    settings = Settings.load({"IMAGEPIPELINE_HOME": "/a b#c%2Fd"})
    assert settings.redis_url == "unix:///a%20b%23c%252Fd/sockets/valkey.sock?db=0"
    for name in ("/what?", "/two\nlines"):
        with pytest.raises(SettingsError, match="IMAGEPIPELINE_HOME"):
            Settings.load({"IMAGEPIPELINE_HOME": name})


def test_a_default_home_below_a_folder_with_a_question_mark_is_refused(tmp_path, monkeypatch):
    (tmp_path / "what?").mkdir()
    monkeypatch.chdir(tmp_path / "what?")
    with pytest.raises(SettingsError, match=r"IMAGEPIPELINE_HOME: .*question mark.*/what\?/"):
        Settings.load({})


def test_the_length_of_a_socket_path_is_counted_in_bytes():
    folder = Settings.load({"IMAGEPIPELINE_HOME": "/" + "é" * 40}).socket_folder
    assert len(os.fsencode(folder)) < 70


def test_a_relative_sqlite_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        Settings.load({"DATABASE_URL": "sqlite:///a/b.db"}).database_url
        == f"sqlite:///{tmp_path}/a/b.db"
    )
    assert (
        Settings.load({"DATABASE_URL": "sqlite:////a/b.db?timeout=9"}).database_url
        == "sqlite:////a/b.db?timeout=9"
    )


@pytest.mark.parametrize("url", ["sqlite:///", "sqlite:///:memory:", "sqlite:///file:x"])
def test_an_in_memory_catalogue_is_refused(url):
    with pytest.raises(SettingsError, match="must name a file"):
        Settings.load({"DATABASE_URL": url})


@pytest.mark.parametrize("name", ["DATABASE_URL", "DAGSTER_DATABASE_URL"])
@pytest.mark.parametrize("parameter", ["schema", "pgbouncer", "connection_limit"])
def test_the_error_for_an_unknown_driver_parameter_names_it(name, parameter):
    with pytest.raises(SettingsError, match=f"{name}: has a parameter .*'{parameter}'") as caught:
        Settings.load({name: f"postgresql://u:canary@h/d?sslmode=require&{parameter}=x"})
    assert "canary" not in str(caught.value)


def test_known_driver_parameters_are_kept():
    url = "postgresql://u@h/d?sslmode=require&application_name=a&host=/tmp"
    assert Settings.load({"DATABASE_URL": url}).database_url == url
    with pytest.raises(SettingsError, match="'mode'"):
        Settings.load({"DATABASE_URL": "sqlite:////a.db?mode=ro"})


@pytest.mark.parametrize(
    "url",
    ["https://[canary/", "https://canary:70000/", "https://canary:x/", "canary", "https:///c"],
)
def test_an_invalid_webhook_url_is_refused_and_not_shown(url):
    environment = {"IMAGEPIPELINE_WEBHOOK_URL": url, "IMAGEPIPELINE_WEBHOOK_SECRET": "x" * 16}
    with pytest.raises(
        SettingsError, match="IMAGEPIPELINE_WEBHOOK_URL: must be an address such as"
    ) as caught:
        Settings.load(environment)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("name", ["OPENAI", "OPENROUTER"])
def test_a_key_is_sent_without_tls_only_if_a_setting_allows_it(name):
    plain = {f"{name}_API_KEY": "canary", f"{name}_BASE_URL": "http://models.example/v1"}
    with pytest.raises(
        SettingsError, match=f"{name}_BASE_URL starts with http://.*ALLOW_PLAIN_HTTP"
    ) as caught:
        Settings.load(plain)
    assert "canary" not in str(caught.value)
    Settings.load(plain | {"IMAGEPIPELINE_ALLOW_PLAIN_HTTP": "1"})
    Settings.load({f"{name}_BASE_URL": "http://models.example/v1"})  # without a key
    for host in ("localhost", "127.0.0.1", "127.1.2.3", "[::1]"):
        Settings.load(plain | {f"{name}_BASE_URL": f"http://{host}:8000/v1"})


def test_a_process_without_a_key_can_be_told_that_the_models_are_remote():
    assert not Settings.load({}).has_remote_vision
    told = Settings.load({"IMAGEPIPELINE_VISION": "remote", "IMAGEPIPELINE_EMBEDDING": "remote"})
    assert told.has_remote_vision
    assert told.has_remote_embedder
    local = {"IMAGEPIPELINE_VISION": "local", "IMAGEPIPELINE_EMBEDDING": "local"}
    kept = Settings.load(local | {"OPENAI_API_KEY": "k", "OPENROUTER_API_KEY": "k"})
    assert not kept.has_remote_vision
    assert not kept.has_remote_embedder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(
            (name, True)
            for name in ("OPENAI_API_KEY", "OPENAI_API_KEY_FILE", "DATABASE_URL", "GITHUB_TOKEN")
        ),
        *((name, True) for name in ("PGPASSWORD", "CELERY_BROKER_URL")),
        *(
            (name, False)
            for name in ("PATH", "IMAGEPIPELINE_HOME", "DAGSTER_HOME", "OPENAI_BASE_URL")
        ),
    ],
)
def test_a_secret_is_recognised_by_its_name(name, expected):
    assert is_secret(name) == expected


@pytest.fixture
def write_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text):
        path = tmp_path / "imagepipeline.toml"
        path.write_text(text, "utf-8-sig")
        return path

    return write


def test_the_file_says_what_the_environment_does_not_and_children_get_both(write_file, monkeypatch):
    path = write_file(
        'storage_root = "photos"\nvision_model = "gpt-4o"\nmax_runs = 7\nkeep_copyright = true\n'
        'list_failed_hours = 2\ntags = ["old town", "sea"]\nredis_host = ""\n'
        '[prices]\n"gpt-4o" = [2.5, 10]\n'
    )
    monkeypatch.setenv("IMAGEPIPELINE_MAX_RUNS", "3")
    monkeypatch.setenv("OPENAI_API_KEY", "canary")
    result = CliRunner().invoke(cli.cli, ["settings", "--json"])
    shown = json.loads(result.output)
    assert shown["file"] == str(path)
    by_name = {one["variable"]: one for one in shown["settings"]}
    assert {name for name, one in by_name.items() if one["source"] == "file"} == {
        *("IMAGEPIPELINE_STORAGE_ROOT", "IMAGEPIPELINE_VISION_MODEL", "IMAGEPIPELINE_PRICES"),
        *("IMAGEPIPELINE_TAGS", "IMAGEPIPELINE_KEEP_COPYRIGHT", "IMAGEPIPELINE_LIST_FAILED_HOURS"),
    }
    assert by_name["IMAGEPIPELINE_MAX_RUNS"] == {
        **{"key": "max_runs", "variable": "IMAGEPIPELINE_MAX_RUNS"},
        **{"value": 3, "source": "environment"},
    }
    assert by_name["OPENAI_API_KEY"]["key"] is None
    assert by_name["IMAGEPIPELINE_HOME"]["source"] == "default"
    assert "canary" not in result.output + CliRunner().invoke(cli.cli, ["settings"]).output

    settings = Settings.load()
    assert settings.prices == {"gpt-4o": (2.5, 10.0)}
    assert settings.vision_tags == ("old town", "sea")
    assert settings.storage == str(path.parent / "photos")
    environment = settings.build_environment()
    path.write_text("max_runs = 'changed since'")
    child = Settings.load(environment)
    named = {"config": settings.config}
    assert child.model_copy(update=named).model_dump() == settings.model_dump()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("vision_model = gpt-4o", r"not TOML: .*line 1, column 16.*quotes"),
        ("vison_model = 'x'", "'vison_model' is no setting .*did you mean vision_model"),
        ("IMAGEPIPELINE_TAGS = ['x']", "did you mean tags"),
        ("[vision]\nmodel = 'x'", "vision: input should be 'auto', 'local' or 'remote'"),
        ("[prices]\nx = [1, 2]\nmax_runs = 3", r"prices\.max_runs: input should be a valid tuple"),
        ("openai_api_key = 'canary'", "a secret, .*set OPENAI_API_KEY or OPENAI_API_KEY_FILE"),
        ("webhook_secret = 'canary'", "set IMAGEPIPELINE_WEBHOOK_SECRET or"),
        ("aws_secret_access_key = 'canary'", "set AWS_SECRET_ACCESS_KEY or"),
        ("index_root = 's3://me:canary@host/x'", "index_root has a password"),
        ("openai_api_key_file = '/canary'", "no setting of this file"),
        ("config = 'other.toml'", "no setting of this file"),
        ("code_socket = '/x'", "no setting of this file"),
        ("max_runs = 101\nmax_bytes = 'many'", "max_runs: .*less than.*100; max_bytes: .*integer"),
        ("max_runs = '5'", "max_runs: must be a whole number, without quotes"),
        ("max_runs = true", "max_runs: must be a whole number"),
        ("max_runs = 5.0", "max_runs: must be a whole number"),
        ("keep_runs_days = 999999", "keep_runs_days: .*less than or equal to 36500"),
        ("list_failed_hours = 1e9", "list_failed_hours: .*less than or equal to 876000"),
        ("keep_copyright = 'yes'", "keep_copyright: must be true or false"),
        ("vision_model = 4", "vision_model: input should be a valid string"),
        ("vision_prompt = 2026-01-01", "vision_prompt: input should be a valid string"),
        ("tags = ['sea, side']", "tags: must have no comma in a word"),
        ("list_failed_hours = inf", "list_failed_hours: input should be a finite number"),
        ('vision_prompt = "a\\u0000"', "NUL"),
        ("home = 'what?'", "home: must have no question mark"),
        ("tags = " + "[" * 5000, "nested too deeply"),
    ],
)
def test_the_file_is_checked_like_the_environment(write_file, text, problem):
    path = write_file(text)
    with pytest.raises(SettingsError, match=problem) as caught:
        Settings.load({})
    assert str(caught.value).startswith(str(path))
    assert "canary" not in str(caught.value)


def test_a_file_is_found_here_if_it_is_ours_or_named_by_a_variable(write_file, tmp_path):
    path = write_file("max_runs = 7")
    path.chmod(0o666)
    with pytest.raises(SettingsError, match="can be changed by other users"):
        Settings.load({})
    named = {"IMAGEPIPELINE_CONFIG": str(path)}  # its folder is the operator's choice
    assert Settings.load(named).max_runs == 7
    path.write_bytes(b"max_runs = 7 # \xff")
    with pytest.raises(SettingsError, match="not UTF-8"):
        Settings.load(named)
    path.unlink()
    assert Settings.load({}).max_runs == 5
    with pytest.raises(SettingsError, match=r"cannot be read \(No such file.*IMAGEPIPELINE_CONFIG"):
        Settings.load(named)
    with pytest.raises(SettingsError, match="cannot be read"):
        Settings.load({"IMAGEPIPELINE_CONFIG": str(tmp_path)})


@pytest.mark.parametrize(
    ("languages", "expected"),
    [
        ("", ("en",)),
        ("EN, de", ("en", "de")),
        ("pt-br,ZH-HANT-tw,es-419,fil", ("pt-BR", "zh-Hant-TW", "es-419", "fil")),
        ("english", "'english' is no language: use BCP 47 tags such as"),
        ("en_US", "'en_US' is no language"),
        ("jp", "'jp' is no language"),
        ("de,DE", "each language once"),
        ("de,en,fr,it,es,pt,nl,da,sv", "at most 8 languages"),
    ],
)
def test_languages_are_bcp_47_tags(languages, expected):
    environment = {"IMAGEPIPELINE_LANGUAGES": languages}
    if isinstance(expected, tuple):
        assert Settings.load(environment).languages == expected
    else:
        with pytest.raises(SettingsError, match=f"IMAGEPIPELINE_LANGUAGES: .*{expected}"):
            Settings.load(environment)
