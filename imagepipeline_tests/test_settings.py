"""Every setting is checked at the start, and a complaint names it."""

import pytest

from imagepipeline.errors import SettingsError
from imagepipeline.settings import Settings


def test_nothing_needs_to_be_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = Settings.load({})
    assert settings.home == tmp_path / ".imagepipeline"
    assert settings.has_own_redis
    assert settings.database_url == f"sqlite:///{tmp_path}/.imagepipeline/catalogue.sqlite"
    assert settings.storage == str(tmp_path / ".imagepipeline" / "storage")


def test_an_empty_variable_counts_as_not_set():
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
def test_a_malformed_setting_is_named_and_its_value_is_not_shown(name, value):
    with pytest.raises(SettingsError) as caught:
        Settings.load({name: value})
    assert name in str(caught.value)
    assert value not in str(caught.value)


def test_all_malformed_settings_are_named_at_once():
    with pytest.raises(SettingsError, match=r"REDIS_PORT.*OPENAI_BASE_URL"):
        Settings.load({"REDIS_PORT": "x", "OPENAI_BASE_URL": "y"})


def test_a_misspelt_setting_is_told_its_right_name():
    with pytest.raises(SettingsError, match="did you mean IMAGEPIPELINE_VISION_MODEL"):
        Settings.load({"IMAGEPIPELINE_VISON_MODEL": "gpt-4o"})


def test_two_ways_to_name_redis_exclude_each_other():
    with pytest.raises(SettingsError, match="REDIS_HOST"):
        Settings.load({"REDIS_URL": "redis://h", "REDIS_HOST": "h"})


def test_redis_may_be_named_by_host_and_port():
    assert Settings.load({"REDIS_HOST": "h"}).redis_url == "redis://h:6379/0"
    assert Settings.load({"REDIS_PORT": "7"}).redis_url == "redis://127.0.0.1:7/0"
    assert not Settings.load({"REDIS_HOST": "h"}).has_own_redis


def test_secrets_are_not_printed():
    settings = Settings.load(
        {"REDIS_URL": "redis://:canary@h", "DATABASE_URL": "postgresql://u:canary@h/d", "OPENAI_API_KEY": "canary"}
    )
    assert "canary" not in repr(settings)
    assert settings.redis_url == "redis://:canary@h"


def test_a_socket_fits_its_limit_wherever_the_home_is(tmp_path):
    deep = tmp_path / ("x" * 200)
    first, second = (Settings.load({"IMAGEPIPELINE_HOME": str(deep / name)}).socket_folder for name in "ab")
    assert len(str(first / "valkey.sock")) < 100
    assert first != second
