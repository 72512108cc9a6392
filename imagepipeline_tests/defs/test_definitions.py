"""The code location is complete, and shows recipes but no secrets."""

import inspect
import json
import pkgutil
from importlib import import_module

import dagster as dg
import pytest

import imagepipeline.defs
from imagepipeline.definitions import build_recipes, build_resources, defs
from imagepipeline.settings import Settings

DEFINITIONS = (
    dg.AssetsDefinition,
    dg.AssetSpec,
    dg.SensorDefinition,
    dg.ScheduleDefinition,
    dg.AssetChecksDefinition,
)


def test_everything_defined_in_defs_is_in_the_definitions(monkeypatch):
    monkeypatch.setenv("IMAGEPIPELINE_EVENT_WEBHOOK_URL", "https://example.com/hook")
    monkeypatch.setenv("IMAGEPIPELINE_WEBHOOK_SECRET", "a secret of ours")
    modules = [
        import_module(f"imagepipeline.defs.{info.name}")
        for info in pkgutil.iter_modules(imagepipeline.defs.__path__)
    ]
    written = {
        id(value): name
        for module in modules
        for name, value in inspect.getmembers(module)
        if isinstance(value, DEFINITIONS)
    }
    repository = defs().get_repository_def()
    listed = {
        *(key.to_user_string() for key in repository.assets_defs_by_key),
        *(sensor.name for sensor in repository.sensor_defs),
        *(checks.op.name for checks in repository.asset_checks_defs_by_key.values()),
    }
    assert {name.removesuffix("_spec") for name in written.values()} == listed
    assert repository.has_job("process_upload")


def test_assets_have_descriptions_owners_and_versions():
    for key, node in defs().get_repository_def().assets_defs_by_key.items():
        spec = node.get_asset_spec(key)
        assert spec.group_name == "images"
        assert spec.owners
        assert spec.kinds
        assert node.is_executable == bool(spec.code_version)
        assert len(spec.description) > 150


@pytest.mark.parametrize(
    ("environment", "metadata", "embedding"),
    [
        ({}, "local:efficientnet-lite0:facts-3", "local:all-MiniLM-L6-v2-int8"),
        (
            {"OPENAI_API_KEY": "k", "IMAGEPIPELINE_VISION_MODEL": "gpt-5"},
            "openai:gpt-5:prompt-",
            "local:",
        ),
        (
            {"OPENROUTER_API_KEY": "k", "IMAGEPIPELINE_EMBEDDING_MODEL": "x/y"},
            "local:",
            "openrouter:x/y",
        ),
    ],
)
def test_a_key_selects_the_remote_model_and_changes_the_code_version(
    environment, metadata, embedding
):
    recipes = build_recipes(Settings.load(environment))
    assert recipes["metadata"].version.startswith(metadata)
    assert recipes["embedding"].version.startswith(embedding)


def test_the_recipe_in_the_code_version_is_the_models_own(monkeypatch):
    environment = {
        "OPENAI_API_KEY": "k",
        "OPENROUTER_API_KEY": "k",
        "IMAGEPIPELINE_VISION_PROMPT": "What is it?",
    }
    for settings in (Settings.load({}), Settings.load(environment)):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        resources, recipes = build_resources(settings), build_recipes(settings)
        for asset, resource in (("metadata", "vision"), ("embedding", "embedder")):
            with dg.build_resources({resource: resources[resource]}) as built:
                assert getattr(built, resource).recipe == recipes[asset]


def test_dagster_neither_stores_nor_shows_secrets(monkeypatch):
    secrets = {
        "OPENAI_API_KEY": "canary1",
        "OPENROUTER_API_KEY": "canary2",
        "REDIS_URL": "redis://:canary3@h",
        "DATABASE_URL": "postgresql://u:canary4@h/d",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    repository = defs().get_repository_def()
    from dagster._core.remote_representation.external_data import RepositorySnap

    snapshot = dg.serialize_value(RepositorySnap.from_def(repository))
    assert "canary" not in snapshot
    assert "The Redis lists on which uploads arrive." in snapshot
    assert json.loads(snapshot)


def test_the_shipped_dagster_yaml_allows_five_runs_and_all_sensors_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEPIPELINE_EVENT_WEBHOOK_URL", "https://example.com/hook")
    monkeypatch.setenv("IMAGEPIPELINE_WEBHOOK_SECRET", "a secret of ours")
    from imagepipeline.runtime.services import _read_packaged

    (tmp_path / "dagster.yaml").write_text(_read_packaged("dagster.yaml"))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert instance.get_concurrency_config().run_queue_config.max_concurrent_runs == 5
        sensors = defs().get_repository_def().sensor_defs
        # So that `queue` is also reported while all other sensors hang.
        assert instance.get_settings("sensors")["num_workers"] >= len(sensors)
        assert instance.run_monitoring_enabled
        # Dagster would compare clocks of different machines. Workers end a run that takes too long.
        assert instance.run_monitoring_max_runtime_seconds == 0
        assert not instance.telemetry_enabled
