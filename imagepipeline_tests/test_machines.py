"""The doctor compares what two machines must share, and shows no secret."""

from contextlib import closing
from dataclasses import asdict

import pytest

from imagepipeline.machines import (
    answers_ping,
    describe,
    find_differences,
    find_silent,
    leave_mark,
    read_answer,
)
from imagepipeline.settings import Settings
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline_tests.conftest import redis_server


@pytest.fixture
def here(tmp_path, redis_url, sqlite_catalogue_url):
    """The environment of a home whose catalogue, storage, index and Redis are shared."""
    environment = {
        "IMAGEPIPELINE_HOME": str(tmp_path / "here"),
        "REDIS_URL": redis_url,
        "DATABASE_URL": sqlite_catalogue_url,
        "IMAGEPIPELINE_STORAGE_ROOT": str(tmp_path / "storage"),
        "IMAGEPIPELINE_INDEX_ROOT": str(tmp_path / "index"),
    }
    with closing(Catalogue(environment["DATABASE_URL"])) as catalogue:
        catalogue.bind("one Dagster")
    return environment


def compare(here, there):
    with leave_mark(Settings.load(here)) as mark:
        return find_differences(
            Settings.load(here), {"w": asdict(describe(Settings.load(there), mark))}
        )


def test_two_homes_on_shared_stores_do_not_differ(here, tmp_path, queue):
    assert compare(here, here | {"IMAGEPIPELINE_HOME": str(tmp_path / "there")}) == []
    assert list(tmp_path.rglob(".doctor-*")) == []


def test_processes_that_do_not_answer_are_named(here, tmp_path, queue):
    settings = Settings.load(here)
    machine = asdict(describe(settings, "0" * 32))
    assert not answers_ping(settings)  # there is no resident
    processes = {"resident": False, "zygote": True}
    answers = {"w": machine | {"processes": processes}, "old": machine}
    assert find_silent(answers) == [
        f"the resident of the worker on {machine['host']} does not answer"
    ]


def test_each_difference_is_one_sentence(here, tmp_path, create_catalogue):
    other_url = create_catalogue(tmp_path / "other.sqlite")
    with closing(Catalogue(other_url)) as catalogue:
        catalogue.bind("another Dagster")
    with redis_server() as other_redis:
        for change, words in (
            ({"DATABASE_URL": other_url}, "another catalogue"),
            (
                {"DATABASE_URL": "postgresql://u:canary@127.0.0.1:1/d"},
                "cannot reach its catalogue",
            ),
            (
                {"IMAGEPIPELINE_STORAGE_ROOT": str(tmp_path / "other")},
                f"its storage is {tmp_path / 'other'}, but this home",
            ),
            (
                {"IMAGEPIPELINE_INDEX_ROOT": str(tmp_path / "other")},
                f"its index is {tmp_path / 'other'}, but this home",
            ),
            ({"REDIS_URL": other_redis}, "another Redis"),
            ({"IMAGEPIPELINE_WEBP_QUALITY": "70"}, "makes variants with"),
            ({"OPENAI_API_KEY": "sk-canary"}, "makes metadata with openai:gpt-4o-mini"),
        ):
            [line] = compare(here, here | change)
            assert line.startswith("the worker on ")
            assert words in line
            assert "canary" not in line


def test_a_different_folder_at_the_same_path_is_detected(here, tmp_path):
    """As on another host that does not share the folder."""
    settings = Settings.load(here)
    with leave_mark(settings) as mark:
        (tmp_path / "storage").rename(tmp_path / "of another host")
        answer = asdict(describe(settings, mark))
        (tmp_path / "of another host").rename(tmp_path / "storage")
    [line] = find_differences(settings, {"w": answer})
    assert "cannot find this home's files" in line
    assert "must be a folder that all machines share, or a bucket" in line


def test_two_buckets_are_distinguished_and_no_password_is_shown(here, bucket_url):
    there = here | {"IMAGEPIPELINE_STORAGE_ROOT": bucket_url + "/there"}
    assert compare(there, there) == []
    [line] = compare(here | {"IMAGEPIPELINE_STORAGE_ROOT": bucket_url + "/here"}, there)
    assert f"its storage is {bucket_url}/there, but this home uses {bucket_url}/here" in line
    shown = describe(
        Settings.load(here | {"IMAGEPIPELINE_STORAGE_ROOT": "s3://u:canary@images/x?key=canary"}),
        "0" * 32,
    )
    assert "canary" not in repr(shown)


def test_a_worker_with_an_unknown_answer_is_reported(here):
    for answer in ({"error": "No such control command"}, None, [], {"host": 1}):
        assert read_answer(answer) is None
        [line] = find_differences(Settings.load(here), {"w@host": answer})
        assert "'w@host' did not describe its configuration" in line


@pytest.mark.parametrize("mark", ["../../etc/passwd", "", "A" * 32, "0" * 33])
def test_an_invalid_mark_is_refused(here, mark):
    with pytest.raises(ValueError, match="is not a mark"):
        describe(Settings.load(here), mark)
