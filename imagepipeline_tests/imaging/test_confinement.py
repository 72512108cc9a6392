"""A compromised decoder can do no harm, and its answers are checked."""

import ast
import ctypes
import os
import pickle
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from imagepipeline.errors import SandboxLostError, UnreadableImageError
from imagepipeline.imaging.confinement import (
    ALLOWED,
    ARCHITECTURES,
    CLONE,
    CLONE3,
    MMAP,
    MPROTECT,
    TGKILL,
    build_filter,
)
from imagepipeline.imaging.decoding import Rules, decode
from imagepipeline.imaging.sandbox import MAX_ANSWER_BYTES, Sandbox, Zygote
from imagepipeline.imaging.variants import Renderer
from imagepipeline.models import build_variant_specs
from imagepipeline.originals import Originals
from imagepipeline.wire import HEADER, MAX_JSON_BYTES
from imagepipeline_tests.conftest import PHOTOS
from imagepipeline_tests.imaging import lying_operations, sandbox_operations

pytestmark = pytest.mark.stack

OPERATIONS = "imagepipeline_tests.imaging.sandbox_operations"
LIES = [
    *lying_operations.ABOUT_THE_IMAGE,
    *lying_operations.ABOUT_VARIANTS,
    *lying_operations.ABOUT_INSPECTIONS,
]
IS_ROOT = os.getuid() == 0


@pytest.fixture(scope="module")
def zygote():
    with closing(Zygote(OPERATIONS)) as zygote:
        yield zygote


@pytest.fixture(
    scope="module",
    params=[OPERATIONS, f"{OPERATIONS}_as_nobody"],
    ids=["as ourselves", "as nobody"],
)
def attacked(request):
    if "nobody" in request.param and not IS_ROOT:
        pytest.skip("only root can become another user")
    with closing(Zygote(request.param)) as zygote:
        yield zygote


def open_session(zygote, **limits):
    return Sandbox(zygote=zygote, **limits).open(sandbox_operations.make_list, [1])


@pytest.mark.parametrize("name", sandbox_operations.ATTACKS)
def test_an_attack_is_refused(attacked, name):
    with open_session(attacked) as session:
        result, _ = session.call(sandbox_operations.attack, name)
        assert result == ("ENOSYS" if name == "clone3" else "EPERM")
        assert session.call(sandbox_operations.get, 0)[0] == 1  # the process survives


@pytest.mark.skipif(not IS_ROOT, reason="some of the attacks need root")
@pytest.mark.parametrize("name", sandbox_operations.HARMLESS)
def test_the_attacks_succeed_without_confinement(name):
    code = f"from {OPERATIONS} import attack; print(attack([], {name!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "done\n"


def test_a_system_call_of_another_architecture_kills_the_process(zygote):
    with open_session(zygote) as session, pytest.raises(SandboxLostError, match="SIGSYS"):
        session.call(sandbox_operations.call_foreign)


def test_threads_can_be_started(attacked):
    with open_session(attacked) as session:
        assert session.call(sandbox_operations.start_threads, 8)[0] == 8


def test_a_process_with_many_threads_is_killed(attacked):
    with open_session(attacked) as session:
        assert session.call(sandbox_operations.keep_threads, 30, 1)[0] == 30
    with open_session(attacked) as session, pytest.raises(SandboxLostError, match="SIGKILL"):
        session.call(sandbox_operations.keep_threads, 60, 10)


def test_the_filters_of_both_architectures_allow_the_same_calls():
    lengths = {name: len(build_filter(name, 1)) for name in ARCHITECTURES}
    assert lengths["x86_64"] - lengths["aarch64"] == 16  # two instructions for x32
    for column in (0, 1):
        assert len({numbers[column] for numbers in ALLOWED.values()}) == len(ALLOWED)


def test_system_call_numbers_agree_with_libseccomp():
    try:
        resolve = ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name_arch
    except OSError:
        pytest.skip("libseccomp is not installed")
    partly = {
        "mmap": MMAP,
        "mprotect": MPROTECT,
        "clone": CLONE,
        "tgkill": TGKILL,
        "clone3": CLONE3,
    }
    for name, numbers in {**ALLOWED, **partly}.items():
        assert tuple(resolve(one, name.encode()) for one in ARCHITECTURES.values()) == numbers, name


def test_a_child_has_none_of_the_runs_memory(tmp_path):
    canary = f"canary-{os.urandom(8).hex()}"
    code = (
        "import sys\n"
        "from imagepipeline.imaging.decoding import Rules, decode\n"
        "from imagepipeline.imaging.sandbox import Sandbox\n"
        "with open(sys.argv[1], 'rb') as file:\n"
        "    content = file.read()\n"
        "secret = open(sys.argv[2])\n"
        "with Sandbox().open(decode, content, Rules()) as session:\n"
        "    print(session.process_id, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    (tmp_path / "secret").write_text("x")
    run = subprocess.Popen(
        [sys.executable, "-c", code, PHOTOS / "cat.jpg", tmp_path / "secret"],
        env=os.environ | {"OPENAI_API_KEY": canary},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    child = Path("/proc", run.stdout.readline().strip())
    try:
        zygote = Path("/proc", (child / "stat").read_text().rpartition(")")[2].split()[1])
        for process in (child, zygote):
            assert (process / "environ").read_bytes() == b""
            assert canary.encode() not in read_memory(process)
        links = sorted(os.readlink(link) for link in (child / "fd").iterdir())
        assert [one.partition(":")[0] for one in links] == ["/dev/null", "pipe", "pipe", "socket"]
        assert links[1] == links[2]  # both ends of one
        # The search works: it finds the canary in the run itself.
        assert canary.encode() in read_memory(Path("/proc", str(run.pid)))
    finally:
        run.communicate("")


def test_the_zygote_imports_only_imaging_and_what_it_needs():
    code = (
        "import sys\n"
        "from imagepipeline.imaging import operations, zygote\n"
        "operations.warm_up()\n"
        "print([name for name in sys.modules\n"
        "    if name.startswith('imagepipeline.') and name.count('.') == 1])\n"
        "print({'dagster', 'redis', 'sqlalchemy', 'openai', 'lancedb', 'ssl'} & set(sys.modules))\n"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", code], env={}, capture_output=True, text=True, check=True
    )
    ours, foreign = result.stdout.splitlines()
    shared = ("errors", "headers", "malloc", "models", "output_formats", "text", "usage", "wire")
    names = sorted(["imaging", *shared])
    assert sorted(ast.literal_eval(ours)) == [f"imagepipeline.{name}" for name in names]
    assert foreign == "set()"


def read_memory(process):
    contents = []
    with open(process / "mem", "rb", buffering=0) as memory:
        for line in (process / "maps").read_text().splitlines():
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            if line.split()[1].startswith("rw"):
                memory.seek(start)
                contents.append(memory.read(end - start) or b"")
    return b"".join(contents)


# ---- malformed messages


def frame(text, content=b""):
    return HEADER.pack(len(text), len(content)) + text + content


USAGE = b'"usage": {"cpu_seconds": 0, "wall_seconds": 0, "peak_bytes": 0}'


class Attack:
    def __reduce__(self):
        return os.system, ("touch /tmp/attacked",)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(struct.pack("!i", 40) + pickle.dumps((Attack(), None, None)), id="a pickle"),
        pytest.param(frame(pickle.dumps(Attack())), id="a pickle in a frame"),
        pytest.param(HEADER.pack(MAX_JSON_BYTES + 1, 0), id="text too long"),
        pytest.param(HEADER.pack(2, MAX_ANSWER_BYTES + 1), id="too many bytes"),
        pytest.param(frame(b"[" * 500_000), id="nested too deeply"),
        pytest.param(frame(b"9" * 500_000), id="endless number"),
        pytest.param(frame(b"[1]"), id="not an answer"),
        pytest.param(frame(b'{"value": [1], ' + USAGE + b', "more": 1}'), id="unknown field"),
        pytest.param(frame(b'{"value": ["x"], ' + USAGE + b"}"), id="wrong type"),
        pytest.param(frame(b'{"value": [1], "usage": {"cpu_seconds": -1}}'), id="incomplete usage"),
        pytest.param(
            frame(b'{"value": [1], ' + USAGE.replace(b"0", b"NaN") + b"}"), id="not a number"
        ),
        pytest.param(
            frame(b'{"value": [1], ' + USAGE.replace(b"0", b"1e300") + b"}"), id="out of range"
        ),
        pytest.param(frame(b'{"value": {"$bytes": 5}, ' + USAGE + b"}"), id="missing bytes"),
        pytest.param(
            frame(b'{"value": {"$bytes": -5}, ' + USAGE + b"}", b"12345"), id="negative bytes"
        ),
        pytest.param(frame(b'{"value": [1], ' + USAGE + b"}", b"12345"), id="unused bytes"),
        pytest.param(
            frame(b'{"error": "LimitError", "message": 5, ' + USAGE + b"}"),
            id="error with a number as message",
        ),
        pytest.param(
            frame(b'{"error": "LimitError", "message": "' + b"x" * 9000 + b'", ' + USAGE + b"}"),
            id="error too long",
        ),
    ],
)
def test_a_malformed_answer_fails_the_image_for_good(zygote, data):
    with (
        open_session(zygote) as session,
        pytest.raises(UnreadableImageError, match="cannot be true"),
    ):
        session.call(sandbox_operations.say, data)  # should return None
    assert not session.is_open
    assert not os.path.exists("/tmp/attacked")


def test_an_answer_that_trickles_in_times_out(zygote):
    with (
        open_session(zygote, wall_seconds=2) as session,
        pytest.raises(SandboxLostError, match="longer than 2 s"),
    ):
        session.call(sandbox_operations.dribble, frame(b'{"value": null, ' + USAGE + b"}"))


@pytest.mark.parametrize(
    "name", ["StaleClaimError", "CatalogueDownError", "PausedError", "SystemExit", "OSError"]
)
def test_a_child_cannot_raise_errors_on_which_the_run_acts(zygote, name):
    with open_session(zygote) as session, pytest.raises(RuntimeError, match=f"{name}: x"):
        session.call(sandbox_operations.raise_named, name, "x")


def test_control_characters_are_removed_from_a_childs_message(zygote):
    message = rb"\u001b[31mred\r\nBcc: a\u202eb\ud800c"
    data = frame(
        b'{"error": "UnreadableImageError", "message": "' + message + b'", ' + USAGE + b"}"
    )
    with (
        open_session(zygote) as session,
        pytest.raises(UnreadableImageError, match="Bcc") as raised,
    ):
        session.call(sandbox_operations.say, data)
    assert str(raised.value) == " [31mred  Bcc: a b c"


# ---- false answers about an image


@pytest.fixture(scope="module")
def liar():
    with closing(Zygote("imagepipeline_tests.imaging.lying_operations")) as zygote:
        yield zygote


@pytest.fixture
def process(liar, files, catalogue, monkeypatch):
    """Processes an original as the assets do, with a decoder that tells the given lie."""
    monkeypatch.setattr("imagepipeline.originals.decode", lying_operations.decode)

    def process(lie):
        content = (PHOTOS / "cat.jpg").read_bytes() + b"lie:" + lie.encode()
        files.put_original("cat", content, "jpg")
        renderer = Renderer(build_variant_specs())
        with closing(Originals(files, Sandbox(zygote=liar), Rules())) as originals:
            original = originals.load(catalogue.claim_anew("cat", "run"), catalogue)
            made, _ = renderer.render(original.session, original.facts, renderer.specs)
            return renderer, made

    return process


def test_an_honest_decoder_is_believed(process):
    assert len(process("")[1]) == 6


@pytest.mark.parametrize(
    "lie",
    [
        *lying_operations.ABOUT_THE_IMAGE,
        *lying_operations.ABOUT_VARIANTS,
        *lying_operations.ABOUT_INSPECTIONS,
    ],
)
def test_a_lie_of_the_decoder_fails_the_image(process, lie):
    with pytest.raises(UnreadableImageError, match="cannot be true"):
        process(lie)


# ---- without support by the kernel

# Refuses seccomp(2), prctl(PR_SET_SECCOMP) and Landlock, as the filter of a container might.
FORBID = """
import ctypes, errno, sys
from imagepipeline.imaging import confinement as c
refuse = c._decide(c.REFUSE | errno.EPERM)
seccomp, prctl = (317, 157) if __import__("platform").machine() == "x86_64" else (277, 167)
program = b"".join([
    c._load(0),
    *(part for number in (seccomp, 444, 446) for part in (c._jump_if(number, 0, 1), refuse)),
    c._jump_if(prctl, 0, 3), c._load(16),
    c._jump_if(c.PR_SET_SECCOMP, 0, 1), refuse, c._decide(c.ALLOW),
])
assert c._control(c.PR_SET_NO_NEW_PRIVS, 1)
described = c._Program(len(program) // 8, program)
assert c._control(c.PR_SET_SECCOMP, c.SECCOMP_MODE_FILTER, ctypes.addressof(described))
"""


def run_without_kernel_support(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", FORBID + code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result


DECODE_TWICE = """
from imagepipeline.imaging.decoding import Rules, decode
from imagepipeline.imaging.sandbox import Sandbox
for _ in range(2):
    with Sandbox().open(decode, open(%r, "rb").read(), Rules()):
        print("decoded")
"""


def test_without_kernel_support_images_are_decoded_and_the_log_warns_once():
    result = run_without_kernel_support(DECODE_TWICE % str(PHOTOS / "cat.jpg"))
    assert result.stdout == "decoded\n" * 2
    assert (
        result.stderr.count(
            "is not confined: its system calls are not filtered, there is no Landlock"
        )
        == 1
    )


def test_without_kernel_support_images_wait_if_confinement_is_required(tmp_path):
    code = """
from imagepipeline.definitions import build_resources
from imagepipeline.doctor import _examine_sandbox
from imagepipeline.imaging.sandbox import Sandbox
from imagepipeline.imaging.decoding import decode
from imagepipeline.errors import PostponedError
from imagepipeline.settings import Settings
settings = Settings.load()
print(_examine_sandbox(settings))
try:
    Sandbox(is_confinement_required=settings.require_confinement).open(decode, b"x")
except PostponedError as error:
    print(error)
"""
    environment = {"IMAGEPIPELINE_HOME": str(tmp_path), "IMAGEPIPELINE_REQUIRE_CONFINEMENT": "1"}
    printed = run_without_kernel_support(code, **environment).stdout
    assert "is_well=False" in printed
    assert "images wait" in printed
    assert "IMAGEPIPELINE_REQUIRE_CONFINEMENT forbids decoding without" in printed


def test_with_kernel_support_images_are_decoded_if_confinement_is_required():
    content = (PHOTOS / "cat.jpg").read_bytes()
    with Sandbox(is_confinement_required=True).open(decode, content, Rules()) as session:
        assert session.is_open
