"""A home is private to its owner, however it was created and whichever command uses it."""

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from imagepipeline.errors import StackError
from imagepipeline.homes import find_faults, make_home, secure_home
from imagepipeline.runtime import services
from imagepipeline.settings import Settings
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.files import FileStore
from imagepipeline_tests.conftest import PHOTOS

pytestmark = pytest.mark.stack

IS_ROOT = os.getuid() == 0
NOBODY = 65534
# Imports all modules before switching to the user nobody, who may not be able to read the package.
BECOME_NOBODY = f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY});"
AS_NOBODY = (
    "import os, sys, sqlite3.dbapi2, platformdirs;"
    "import multiprocessing.forkserver;"
    "from imagepipeline import cli, display, doctor, providers, storage;"
    "from imagepipeline.runtime import supervisor;"
    "from imagepipeline.stores import ledger, migrations, uploads;"
    f"{BECOME_NOBODY}"
    "sys.argv = ['imagepipeline', *sys.argv[1:]]; cli.main()"
)
only_root = pytest.mark.skipif(not IS_ROOT, reason="only root can become another user")


@pytest.fixture(autouse=True)
def open_umask(no_settings_from_outside):
    os.umask(0o022)


def load(home, **changes):
    return Settings.load({"IMAGEPIPELINE_HOME": str(home), **changes})


def run(home, *command, umask=0, **environment):
    """Runs a command as a user whose new files are open to everybody."""
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"IMAGEPIPELINE_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
        umask=umask,
    )


def call(home, *arguments, **environment):
    return run(home, "-m", "imagepipeline.cli", *arguments, **environment)


def call_as_nobody(home, *arguments, **environment):
    return run(home, "-c", AS_NOBODY, *arguments, **environment)


def list_open(home):
    """Returns the files and folders of a home that other users may access, with their modes."""
    paths = [home, *home.rglob("*")]
    return {
        str(path.relative_to(home)): oct(path.lstat().st_mode)
        for path in paths
        if path.lstat().st_mode & 0o077
    }


def mode_of(path):
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def open_home(tmp_path):
    """A home open to others, as made by `mkdir` and an earlier version."""
    home = tmp_path / "home"
    for folder in (
        "",
        "dagster/storage",
        "logs",
        "lancedb/a.lance",
        "valkey",
        "sockets",
        "storage/original",
    ):
        (home / folder).mkdir(exist_ok=True, parents=True)
    for file in (
        "dagster/dagster.yaml",
        "dagster/storage/runs.db",
        "logs/redis.log",
        "valkey/dump.rdb",
        "stack.lock",
    ):
        (home / file).write_text("")
    (home / "stack.lock").write_text("{}")
    (home / "dagster" / "storage" / "runs.db").unlink()
    Catalogue(f"sqlite:///{home / 'catalogue.sqlite'}").migrate()
    for path in (home, *home.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return home


COMMANDS = {
    "status": ["-m", "imagepipeline.cli", "status"],
    "list": ["-m", "imagepipeline.cli", "failed", "list"],
    "push": ["-m", "imagepipeline.cli", "push", str(PHOTOS / "cat.jpg")],
    "migrate": ["-m", "imagepipeline.cli", "migrate"],
    "service": ["-m", "imagepipeline.cli", "service", "webserver", "--check"],
    "definitions": [
        "-c",
        "from imagepipeline.definitions import defs; defs().resolve_all_job_defs()",
    ],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_closes_an_open_home(open_home, redis_url, name):
    result = run(open_home, *COMMANDS[name], REDIS_URL=redis_url)
    assert "Traceback" not in result.stderr, result.stderr
    assert (
        f"{open_home} is open to other users (rwxr-xr-x); their access has been removed"
        in result.stderr
    )
    found = list_open(open_home)
    assert {name for name in found if not name.startswith("storage")} == set()
    if name == "status":  # the next command finds nothing to say
        again = run(open_home, *COMMANDS[name], REDIS_URL=redis_url)
        assert "open to other users" not in again.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "imagepipeline.instance.migration"],
        ["-m", "imagepipeline.runtime.examination"],
        ["-m", "dagster", "instance", "migrate"],
    ],
    ids=" ".join,
)
def test_files_made_by_our_modules_or_by_dagsters_tools_are_private(tmp_path, command):
    home = tmp_path / "home"
    settings = load(home)
    services.prepare(settings)
    result = run(
        home, *command, DAGSTER_HOME=services.build_environment(settings, "daemon")["DAGSTER_HOME"]
    )
    made = {path.name for path in home.rglob("*.db")}
    assert "runs.db" in made, result.stderr
    assert [
        name for name in list_open(home) if Path(name).name in made or "catalogue" in name
    ] == []
    assert (mode_of(home), mode_of(home / "dagster")) == (0o700, 0o700)


def test_all_files_of_a_running_stack_are_private():
    """Uses a short path, so that the sockets are in the home."""
    with tempfile.TemporaryDirectory(prefix="ip", dir="/tmp") as folder:
        home = Path(folder, "home")
        result = call(home, "demo", "--exit", "--json", str(PHOTOS / "cat.jpg"))
        assert result.returncode == 0, result.stderr
        assert '"completed"' in result.stdout
        names = {path.name for path in home.iterdir()}
        assert {
            "catalogue.sqlite",
            "dagster",
            "lancedb",
            "logs",
            "stack.lock",
            "storage",
            "valkey",
        } <= names
        assert list_open(home) == {}


def test_a_folder_with_other_files_is_not_closed(tmp_path):
    home = tmp_path / "project"
    home.mkdir(mode=0o755)
    (home / "index.html").write_text("served")
    result = call(home, "migrate")
    assert result.returncode == 4
    assert (
        f"{home} is open to other users (rwxr-xr-x), and they may need {home / 'index.html'}"
        in result.stderr
    )
    assert "chmod go=" in result.stderr
    assert mode_of(home) == 0o755
    assert [path.name for path in home.iterdir()] == ["index.html"]


def test_a_home_that_contains_a_configured_storage_root_is_not_closed(tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    settings = load(home, IMAGEPIPELINE_STORAGE_ROOT=str(home / "storage"))
    with pytest.raises(StackError, match=r"they may need .*storage: move that out of the home"):
        make_home(settings)
    assert mode_of(home) == 0o755
    home.chmod(0o700)
    make_home(settings)


def test_a_shared_folder_is_not_closed(tmp_path):
    home = tmp_path / "shared"
    home.mkdir()
    home.chmod(0o1777)
    with pytest.raises(StackError, match=r"on purpose .*: set IMAGEPIPELINE_HOME"):
        make_home(load(home))
    assert mode_of(home) == 0o1777


def test_targets_of_links_in_a_home_are_left_unchanged(open_home, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("theirs")
    elsewhere.chmod(0o755)
    (elsewhere / "file").chmod(0o644)
    shutil.rmtree(open_home / "lancedb")
    (open_home / "lancedb").symlink_to(elsewhere)
    (open_home / "logs" / "link").symlink_to(elsewhere / "file")
    secure_home(load(open_home))
    assert (mode_of(elsewhere), mode_of(elsewhere / "file")) == (0o755, 0o644)
    assert mode_of(open_home / "logs" / "redis.log") == 0o600


def test_a_home_named_like_one_of_its_folders_is_closed_without_its_storage(tmp_path):
    home = tmp_path / "dagster"
    (home / "storage").mkdir(parents=True)
    home.chmod(0o755)
    (home / "storage").chmod(0o755)
    make_home(load(home))
    assert (mode_of(home), mode_of(home / "storage")) == (0o700, 0o755)


def make_accessible(path):
    """Lets the user nobody access a path of the tests."""
    for parent in path.parents:
        if parent == Path(tempfile.gettempdir()):
            return
        parent.chmod(parent.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)


@only_root
def test_another_users_home_is_refused_in_one_sentence_and_left_alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "home").mkdir()
    make_accessible(folder / "home")
    for arguments in (
        ["up"],
        ["service", "webserver"],
        ["migrate"],
        ["status"],
        ["push", str(PHOTOS / "cat.jpg")],
    ):
        result = call_as_nobody(folder / "home", *arguments)
        assert result.returncode == 4, result.stderr
        assert (
            f"{folder / 'home'} belongs to user 0, not to {NOBODY}: set IMAGEPIPELINE_HOME"
            in result.stderr
        )
        assert "Traceback" not in result.stderr
    for arguments in (["up"], ["service", "webserver"], ["migrate"]):
        result = call_as_nobody(folder / "new", *arguments)
        assert result.returncode == 4, result.stderr
        assert f"{folder / 'new'} cannot be used as the home (Permission denied)" in result.stderr
        assert "Traceback" not in result.stderr
    assert list(folder.iterdir()) == [folder / "home"]
    assert list((folder / "home").iterdir()) == []


@only_root
@pytest.mark.parametrize(
    "arguments", [["up"], ["status"], ["migrate"], ["push", str(PHOTOS / "cat.jpg")]]
)
def test_root_also_refuses_another_users_home(tmp_path, arguments):
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    os.chown(home, NOBODY, NOBODY)
    result = call(home, *arguments)
    assert result.returncode == 4
    assert f"{home} belongs to user {NOBODY}, not to 0" in result.stderr
    assert list(home.iterdir()) == []


@only_root
def test_an_owner_who_is_not_root_can_close_a_home(tmp_path_factory):
    home = tmp_path_factory.mktemp("nobodys") / "home"
    home.mkdir(mode=0o755)
    make_accessible(home)
    Catalogue(f"sqlite:///{home / 'catalogue.sqlite'}").migrate()
    for path in (home, *home.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    result = call_as_nobody(home, "list", "--json")
    assert result.stdout == "[]\n", result.stderr
    assert list_open(home) == {}


@only_root
@pytest.mark.parametrize("name", ["dagster", "catalogue.sqlite", "valkey", "logs"])
def test_another_users_file_in_a_home_is_refused(open_home, name):
    os.chown(open_home / name, NOBODY, NOBODY)
    with pytest.raises(StackError, match=f"{name} belongs to user {NOBODY}, not to 0: remove it"):
        secure_home(load(open_home))


@only_root
def test_another_users_link_to_a_home_is_refused(tmp_path):
    (tmp_path / "ours").mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "ours")
    make_home(load(link))
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(StackError, match=f"is a symbolic link that belongs to user {NOBODY}"):
        make_home(load(link))


@pytest.fixture
def long_home_settings(tmp_path):
    """Settings with a home whose path is too long for sockets, which are then in /tmp."""
    settings = load(tmp_path / ("x" * 80))
    folder = settings.socket_folder
    assert folder.parent == Path("/tmp")
    yield settings
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_socket_folder_that_is_a_link_is_refused(long_home_settings, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    # Anybody can create a link in /tmp.
    long_home_settings.socket_folder.symlink_to(tmp_path / "elsewhere")
    for use in (services.prepare, secure_home):
        with pytest.raises(StackError, match="is a symbolic link: remove it"):
            use(long_home_settings)


def test_a_socket_folder_is_closed_each_time_it_is_used(long_home_settings):
    services.prepare(long_home_settings)
    assert mode_of(long_home_settings.socket_folder) == 0o700
    for use in (services.prepare, secure_home):
        long_home_settings.socket_folder.chmod(0o777)
        use(long_home_settings)
        assert mode_of(long_home_settings.socket_folder) == 0o700


@only_root
def test_commands_do_not_connect_to_another_users_server(long_home_settings):
    services.prepare(long_home_settings)
    folder = long_home_settings.socket_folder
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "valkey.sock"))
        server.listen()
        server.setblocking(False)
        os.chown(folder, NOBODY, NOBODY)
        for arguments in (["push", str(PHOTOS / "cat.jpg")], ["status"], ["doctor"]):
            result = call(long_home_settings.home, *arguments)
            assert f"{folder} belongs to user {NOBODY}, not to 0" in result.stdout + result.stderr
            if arguments != ["doctor"]:
                assert result.returncode == 4
                with pytest.raises(BlockingIOError):
                    server.accept()


@pytest.mark.parametrize(
    ("mode", "is_refused"), [(0o1777, True), (0o770, True), (0o755, False), (0o700, False)]
)
def test_a_code_socket_in_a_folder_writable_by_others_is_refused(tmp_path, mode, is_refused):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(mode)
    settings = load(
        tmp_path / "home", IMAGEPIPELINE_CODE_SOCKET=str(tmp_path / "shared" / "code.sock")
    )
    assert (
        any("IMAGEPIPELINE_CODE_SOCKET" in fault.advice for fault in find_faults(settings))
        is is_refused
    )
    if is_refused:
        with pytest.raises(StackError, match="other users may write to"):
            services.prepare(settings)
    else:
        services.prepare(settings)
    assert mode_of(tmp_path / "shared") == mode


@pytest.mark.parametrize(
    ("folder", "file"),
    [(0o755, 0o644), (0o750, 0o640), (0o711, 0o644), (0o700, 0o600), (0o2775, 0o644)],
)
def test_stored_files_are_as_open_as_the_storage_root(tmp_path, folder, file):
    root = tmp_path / "storage"
    root.mkdir()
    root.chmod(folder)
    before = os.umask(0o077)
    try:
        FileStore(root).write("variants/2026/a-sm.webp", b"x")
    finally:
        os.umask(before)
    for path in (root / "variants", root / "variants" / "2026"):
        assert mode_of(path) == folder
    assert mode_of(root / "variants" / "2026" / "a-sm.webp") == file


def test_originals_can_be_private_while_variants_are_public(tmp_path):
    store = FileStore(tmp_path / "storage")
    (tmp_path / "storage" / "original").mkdir(parents=True)
    (tmp_path / "storage").chmod(0o755)
    (tmp_path / "storage" / "original").chmod(0o700)
    store.put_original("a", b"x", "jpg")
    store.write("variants/a-sm.webp", b"x")
    assert mode_of(tmp_path / "storage" / "original" / "a.jpg") == 0o600
    assert mode_of(tmp_path / "storage" / "variants" / "a-sm.webp") == 0o644


def test_a_new_storage_root_is_as_open_as_its_parent_except_for_writing(tmp_path):
    for around, made in ((0o755, 0o755), (0o1777, 0o755), (0o700, 0o700), (0o2775, 0o2755)):
        folder = tmp_path / oct(around)
        folder.mkdir()
        folder.chmod(around)
        FileStore(folder / "a" / "b").make_root()
        assert (mode_of(folder / "a"), mode_of(folder / "a" / "b")) == (made, made)


@only_root
def test_a_web_server_may_read_a_pushed_photo(tmp_path_factory, redis_url):
    folder = tmp_path_factory.mktemp("served")
    (folder / "public").mkdir()
    (folder / "public").chmod(0o755)
    make_accessible(folder / "public")
    result = call(
        folder / "home", "push", str(PHOTOS / "cat.jpg"), "--id", "cat", REDIS_URL=redis_url,
        IMAGEPIPELINE_STORAGE_ROOT=str(folder / "public"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    read = ["-c", f"import os, sys; {BECOME_NOBODY} open(sys.argv[1]).close()"]
    assert (
        run(folder / "home", *read, str(folder / "public" / "original" / "cat.jpg")).returncode == 0
    )
