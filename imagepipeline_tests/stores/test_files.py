"""Files and objects are replaced atomically, and nothing outside the storage root is opened."""

import contextlib
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from imagepipeline.errors import (
    InvalidUploadError,
    MissingOriginalError,
    StaleClaimError,
    StorageDownError,
    UnsafePathError,
)
from imagepipeline.models import Claim, Embedding
from imagepipeline.stores.files import FileStore
from imagepipeline.stores.objects import ObjectStore
from imagepipeline.stores.vectors import EmbeddingIndex


def test_an_original_is_found_by_its_id(storage):
    path = storage.put_original("a", b"x", "jpg")
    assert storage.list_originals_of("a") == [path] == ["original/a.jpg"]
    assert storage.read(path) == b"x"


def test_the_error_for_a_missing_file_names_it(storage):
    assert storage.list_originals_of("a") == []
    storage.put_original("b", b"x", "jpg")
    with pytest.raises(MissingOriginalError, match=r"original/a\.jpg"):
        storage.read("original/a.jpg")


def test_an_original_with_another_extension_is_kept_beside_the_new_one(storage):
    storage.put_original("a", b"1", "jpg")
    storage.put_original("a", b"2", "png")
    storage.put_original("a", b"3", "png")
    assert storage.list_originals_of("a") == ["original/a.jpg", "original/a.png"]
    assert [storage.read(path) for path in storage.list_originals_of("a")] == [b"1", b"3"]


def test_an_invalid_id_never_reaches_the_disk(storage):
    for image_id in ("*", "../x", "a/b", ""):
        with pytest.raises(InvalidUploadError):
            storage.list_originals_of(image_id)
        with pytest.raises(InvalidUploadError):
            storage.put_original(image_id, b"", "jpg")


@pytest.mark.parametrize("kind", ["link", "link to a folder", "fifo", "folder"])
def test_only_regular_files_are_read(files, tmp_path, kind):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "a.jpg").write_bytes(b"secret")
    files.write("original/x.jpg", b"")
    target = files.root / "original" / "a.jpg"
    path = "original/a.jpg"
    if kind == "link":
        target.symlink_to(secret / "a.jpg")
    elif kind == "link to a folder":
        (files.root / "original" / "sub").symlink_to(secret)
        path = "original/sub/a.jpg"
    elif kind == "fifo":
        os.mkfifo(target)
    else:
        target.mkdir()
    with pytest.raises(MissingOriginalError):
        files.read(path)


def test_no_more_than_the_limit_is_read(storage):
    storage.write("original/a.jpg", b"x" * 100)
    storage.write("original/b.jpg", b"")
    assert len(storage.read("original/a.jpg", max_bytes=10)) == 11
    assert storage.read("original/b.jpg", max_bytes=10) == b""


def test_an_original_is_found_among_longer_ids(storage):
    for name in ("a-b.jpg", "a-.png", "a_b.jpg", "ab.jpg", "a.webp", "A.jpg"):
        storage.write(f"original/{name}", b"")
    assert storage.list_originals_of("a") == ["original/a.webp"]


def test_deleting_a_file_twice_succeeds(storage):
    storage.write("variants/a.webp", b"")
    storage.delete("variants/a.webp")
    storage.delete("variants/a.webp")
    with pytest.raises(MissingOriginalError):
        storage.read("variants/a.webp")


def test_only_originals_that_are_not_recent_are_listed(storage, monkeypatch):
    for name in ("a.jpg", "b.png", "no id.jpg", "c", "sub/d.jpg"):
        storage.write(f"original/{name}", b"")
    assert storage.list_originals() == {}
    monkeypatch.setattr("imagepipeline.stores.files.SETTLED_SECONDS", -60)
    monkeypatch.setattr("imagepipeline.stores.objects.SETTLED", timedelta(seconds=-60))
    found = storage.list_originals()
    assert {key: file.path for key, file in found.items()} == {
        "a": "original/a.jpg",
        "b": "original/b.png",
    }
    assert abs((datetime.now(UTC) - found["a"].changed_at).total_seconds()) < 60
    assert storage.list_leftovers() == []


def test_readers_of_a_bucket_see_either_the_old_or_the_new_content(bucket_url):
    storage = ObjectStore(bucket_url)
    contents = [letter * 3_000_000 for letter in (b"a", b"b")]
    storage.write("variants/a.webp", contents[0])
    with ThreadPoolExecutor() as pool:
        writes = [
            pool.submit(storage.write, "variants/a.webp", contents[number % 2])
            for number in range(20)
        ]
        while not all(write.done() for write in writes):
            assert storage.read("variants/a.webp") in contents
        for write in writes:
            write.result()


def test_the_content_type_of_an_object_does_not_come_from_its_uploader(bucket_url):
    storage = ObjectStore(bucket_url)
    kinds = {}
    for path in ("original/a.html", "variants/a-sm.avif", "variants/a-sm.webp"):
        storage.write(path, b"")
        kinds[path] = storage._bucket.get(path).attributes["Content-Type"]
    assert list(kinds.values()) == ["application/octet-stream", "image/avif", "image/webp"]


def test_images_wait_for_a_bucket_that_is_down_and_its_address_is_not_shown(
    bucket_url, monkeypatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("imagepipeline.stores.objects.RETRIES", 0)
    for act in (
        lambda store: store.read("original/a.jpg"),
        lambda store: store.write("original/a.jpg", b""),
        lambda store: store.list_originals_of("a"),
        lambda store: store.delete("original/a.jpg"),
    ):
        with pytest.raises(StorageDownError) as caught:
            act(ObjectStore(bucket_url))
        assert "127.0.0.1" not in str(caught.value)


def test_the_index_in_a_bucket_supports_concurrent_writers(bucket_url):
    embedding = Embedding("a cat", (0.6, 0.8), "test:model")

    def upsert(fence):
        with contextlib.suppress(StaleClaimError):
            EmbeddingIndex(f"{bucket_url}/lancedb").upsert(Claim("cat", 1, fence, None), embedding)

    upsert(1)  # creates the table
    with ThreadPoolExecutor() as pool:
        list(pool.map(upsert, [3, 1, 6, 2, 5, 4]))
    index = EmbeddingIndex(f"{bucket_url}/lancedb")
    assert index.count_rows() == 1
    assert index.get("cat", "test:model")["fence"] == 6


def test_a_file_is_replaced_and_no_temporary_file_is_left(files):
    files.write("variants/a/b.webp", b"old")
    files.write("variants/a/b.webp", b"new")
    assert files.read("variants/a/b.webp") == b"new"
    assert [path.name for path in (files.root / "variants" / "a").iterdir()] == ["b.webp"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(files, monkeypatch):
    files.write("variants/b.webp", b"old")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write("variants/b.webp", b"new")
    assert files.read("variants/b.webp") == b"old"
    assert len(list((files.root / "variants").iterdir())) == 1


@pytest.mark.parametrize("folder", ["original", "variants"])
def test_links_are_followed_neither_for_writing_nor_for_listing(files, tmp_path, folder):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.jpg").write_bytes(b"theirs")
    files.root.mkdir()
    (files.root / folder).symlink_to(outside)
    with pytest.raises(UnsafePathError, match=f"{folder}/a.jpg"):
        files.write(f"{folder}/a.jpg", b"ours")
    assert (outside / "a.jpg").read_bytes() == b"theirs"
    if folder == "original":
        with pytest.raises(MissingOriginalError, match="is a symbolic link, which is not followed"):
            files.list_originals_of("a")
        with pytest.raises(MissingOriginalError, match="is a symbolic link, which is not followed"):
            files.read("original/a.jpg")


def test_a_file_deleted_during_a_listing_does_not_affect_the_others(files, monkeypatch):
    for name in ("a", "b", "c"):
        files.put_original(name, b"x", "jpg")
        os.utime(files.root / "original" / f"{name}.jpg", (0, 0))
    look = os.stat

    def look_late(name, **options):
        if name == "b.jpg":
            (files.root / "original" / "b.jpg").unlink()
        return look(name, **options)

    monkeypatch.setattr(os, "stat", look_late)
    assert list(files.list_originals()) == ["a", "c"]


def test_only_files_are_leftovers(files):
    files.write("variants/a.webp", b"x")
    for name in (".x.tmp", ".y.tmp"):
        path = files.root / "variants" / name
        path.mkdir() if name == ".x.tmp" else path.touch()
        os.utime(path, (0, 0))
    assert files.list_leftovers() == ["variants/.y.tmp"]


def test_neither_content_nor_keys_are_sent_to_the_target_of_a_redirect(httpserver, monkeypatch):
    for name, value in {
        "ACCESS_KEY_ID": "k",
        "SECRET_ACCESS_KEY": "s",
        "REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{httpserver.port}")
    elsewhere = f"http://localhost:{httpserver.port}/elsewhere"
    httpserver.expect_request("/images/x/a.webp").respond_with_data(
        "", 307, {"Location": elsewhere}
    )
    httpserver.expect_request("/elsewhere").respond_with_data("")
    store = ObjectStore("s3://images/x")
    with pytest.raises(StorageDownError):
        store.write("a.webp", b"a picture")
    with contextlib.suppress(StorageDownError):
        store.read("a.webp")
    for request, _ in httpserver.log:
        if request.path == "/elsewhere":
            assert request.get_data() == b""
            assert "Authorization" not in request.headers


def test_create_never_replaces_a_file(storage):
    assert storage.create("original/a.png", b"first")
    assert not storage.create("original/a.png", b"second")
    assert storage.read("original/a.png") == b"first"
    assert [file.path for file in storage.list_files()] == ["original/a.png"]


def test_create_without_hard_links(files, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_create_never_replaces_a_file(files)
    assert not files.list_leftovers()


def test_what_was_written_or_deleted_is_durable(tmp_path, check_durable):
    top = tmp_path / "top"
    top.mkdir()
    files = FileStore(top / "new" / "storage")
    files.write("variants/a/b.webp", b"new")
    check_durable(top / "new")
    files.write("variants/a/b.webp", b"newer")
    assert files.create("original/a.jpg", b"x")
    check_durable(top / "new")
    assert files.link("original/b.jpg", files.root / "original" / "a.jpg")
    files.delete("variants/a/b.webp")
    files.delete("variants/none/b.webp")
    check_durable(top)


def test_a_deletion_that_was_not_durable_is_so_when_it_is_repeated(files, check_durable):
    files.write("variants/b.webp", b"x")
    (files.root / "variants" / "b.webp").unlink()  # by a process that was killed before it synced
    files.delete("variants/b.webp")
    check_durable(files.root)
