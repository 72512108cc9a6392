"""The doctor: looks at everything a pipeline stands on, one finding each, with what to do about it."""

import functools
import io
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from imagepipeline.errors import (
    FormatRefusedError,
    ImagePipelineError,
    PausedError,
    PostponedError,
    RedisClusterError,
    StackError,
)
from imagepipeline.homes import find_faults
from imagepipeline.models import PixelFacts
from imagepipeline.settings import Settings

MAX_CLOCK_SKEW_SECONDS = 2
MIN_FREE_BYTES = 2_000_000_000
MIN_OPEN_FILES = 1024
MAX_QUESTIONS = 5
FULL_SHARE = 0.9  # of Redis's maxmemory
FLOOD_ADVICE = "mend the uploader, then `imagepipeline failed discard --reason unreadable`"
EVICTION_ADVICE = "set maxmemory-policy noeviction, or uploads get lost"


@dataclass(frozen=True)
class Finding:
    """What was found of one thing; `advice` says what to do, and is empty where all is well."""

    name: str
    is_well: bool
    sentence: str
    advice: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Looks at each thing in turn; the providers are asked one tiny question each, which they may charge for."""
    ask_dagster = functools.cache(
        lambda: _ask_dagster(settings)
    )  # it takes a process that imports Dagster
    checks: dict[str, Callable[[Settings], Finding]] = {
        "home": _examine_home,
        "redis": _examine_redis,
        "database": _examine_database,
        "storage": _examine_storage,
        "index": _examine_index,
        "clock": _examine_clock,
        "limits": _examine_limits,
        "prices": _examine_prices,
        "sandbox": _examine_sandbox,
        "code server": _examine_code_server,
        "workers": _examine_workers,
        "daemon": lambda _: _examine_daemon(ask_dagster()),
        "sensors": lambda _: _examine_sensors(ask_dagster()),
        "webserver": _examine_webserver,
        "vision model": _examine_vision,
        "embedding model": _examine_embedder,
        "pauses": _examine_pauses,
    }
    for name, check in checks.items():
        try:
            yield check(settings)
        except Exception as error:  # a doctor who faints helps nobody; values of settings may be in foreign messages
            sentence = (
                str(error)
                if isinstance(error, ImagePipelineError)
                else f"{type(error).__name__} came up"
            )
            is_elsewhere = isinstance(error, PostponedError) and not isinstance(error, PausedError)
            yield Finding(
                name, False, sentence, "mend that first" if is_elsewhere else ADVICE[name]
            )


START = "start the stack with `imagepipeline up`"
ADVICE = {
    "home": "set IMAGEPIPELINE_HOME to a folder of this user",
    "code server": f"{START}; its log says why it ended",
    "workers": f"{START}, or one worker with `imagepipeline service worker`; its log says why it ended",
    "daemon": f"{START}; its log says why it ended",
    "sensors": START,
    "webserver": f"{START}; its log says why it ended",
    "redis": "start the stack with `imagepipeline up`, or correct REDIS_URL",
    "database": "start the stack with `imagepipeline up`, or correct DATABASE_URL",
    "storage": "make IMAGEPIPELINE_STORAGE_ROOT a folder this user may write to",
    "index": "mend or restore the folder `lancedb` in IMAGEPIPELINE_HOME, or materialize `embedding` again",
    "clock": "start Redis first",
    "limits": "look at `ulimit -a`",
    "prices": "correct IMAGEPIPELINE_PRICES",
    "sandbox": "reinstall the package; look whether memory is short",
    "vision model": "correct OPENAI_BASE_URL, OPENAI_API_KEY or IMAGEPIPELINE_VISION_MODEL",
    "embedding model": "correct OPENROUTER_BASE_URL, OPENROUTER_API_KEY or IMAGEPIPELINE_EMBEDDING_MODEL",
    "pauses": "start the stack with `imagepipeline up`",
}


def _examine_home(settings: Settings) -> Finding:
    home = settings.home
    if not home.is_dir():
        return Finding(
            "home", False, f"there is no folder {home}", "start the stack with `imagepipeline up`"
        )
    for fault in find_faults(settings):
        return Finding("home", False, fault.sentence, fault.cure)
    with tempfile.TemporaryFile(dir=home):
        pass
    free_bytes = shutil.disk_usage(home).free
    if free_bytes < MIN_FREE_BYTES:
        return Finding(
            "home", False, f"only {free_bytes / 1e9:.1f} GB are free below {home}", "make room"
        )
    return Finding(
        "home",
        True,
        f"{home} can be written, by its owner only; {free_bytes / 1e9:.0f} GB are free",
    )


def _examine_code_server(settings: Settings) -> Finding:
    from imagepipeline.runtime import services

    if settings.dagster_database_url and not settings.code_address.exists():
        return Finding(
            "code server",
            True,
            "it runs elsewhere, if it does: ask it there, with `service code-server --check`",
        )
    if not services.answers_grpc(settings.code_address):
        return Finding("code server", False, "it does not answer", ADVICE["code server"])
    return Finding("code server", True, "it answers")


def _examine_workers(settings: Settings) -> Finding:
    from imagepipeline import machines
    from imagepipeline.runtime import services

    names = services.list_workers(settings)
    if not names:
        return Finding("workers", False, "none answers, so that no run begins", ADVICE["workers"])
    with machines.leave_mark(settings) as mark:
        answers = services.ask_workers(
            settings, machines.COMMAND, {"mark": mark}, names, services.WORK_SECONDS
        )
    differences = [
        f"{name} does not say what it works with" for name in names if name not in answers
    ]
    differences += machines.find_differences(settings, answers)
    if differences:
        advice = "give all machines the same settings and versions: docs/operations.md says what they must share"
        return Finding("workers", False, "; ".join(differences), advice)
    found = sorted(
        (machine.host, machine.slots)
        for answer in answers.values()
        if (machine := machines.read_answer(answer))
    )
    sentence = ", ".join(
        f"{host} ({slots} {'slot' if slots == 1 else 'slots'})" for host, slots in found
    )
    slots = sum(slots for _, slots in found)
    if settings.max_runs > slots:
        advice = "start more workers, or set IMAGEPIPELINE_MAX_RUNS to what they can do"
        return Finding(
            "workers",
            False,
            f"of {settings.max_runs} runs at a time, only {slots} find a slot: {sentence}",
            advice,
        )
    return Finding("workers", True, f"they answer, and share what they must: {sentence}")


def _examine_daemon(said: Mapping[str, Mapping[str, str]]) -> Finding:
    if problems := _list_problems(said["daemon"]):
        return Finding("daemon", False, "; ".join(problems), ADVICE["daemon"])
    return Finding("daemon", True, "all its parts have given a sign of life")


def _examine_sensors(said: Mapping[str, Mapping[str, str]]) -> Finding:
    if problems := _list_problems(said["sensors"]):
        return Finding(
            "sensors",
            False,
            "; ".join(problems),
            "without them nothing is taken in, recovered or told",
        )
    return Finding("sensors", True, "all run, and none fails")


def _ask_dagster(settings: Settings) -> dict[str, dict[str, str]]:
    from imagepipeline.runtime import services

    if not settings.dagster_database_url and not (settings.home / "dagster" / "storage").is_dir():
        raise StackError("there is no Dagster in this home yet")
    return services.examine_daemon(settings)


def _list_problems(said: Mapping[str, str]) -> list[str]:
    return [f"{name} {problem}" for name, problem in said.items() if problem]


def _examine_webserver(settings: Settings) -> Finding:
    from imagepipeline.runtime import services, supervisor

    state = supervisor.find_running(settings)
    url = (state or {}).get("webserver_url")
    if url is None and settings.dagster_database_url:
        return Finding(
            "webserver",
            True,
            "it runs elsewhere, if it does: ask it there, with `service webserver --check`",
        )
    if url is None or not services.answers_http(f"{url}/server_info"):
        return Finding("webserver", False, "it does not answer", ADVICE["webserver"])
    return Finding("webserver", True, f"it answers at {url}")


def _examine_redis(settings: Settings) -> Finding:
    import redis

    from imagepipeline.stores.connection import connect
    from imagepipeline.stores.uploads import UploadQueue

    try:
        with closing(UploadQueue(settings.redis_url, settings.queue_prefix)) as queue:
            queue.count()
            dropped = queue.count_dropped()
    except RedisClusterError as error:
        return Finding(
            "redis", False, str(error), "let REDIS_URL name a server that belongs to no cluster"
        )
    if dropped:
        return Finding(
            "redis",
            False,
            f"{dropped} unreadable entries were dropped, as more came than are kept",
            FLOOD_ADVICE,
        )
    client = connect(settings.redis_url)
    try:
        client.ping()
        memory = client.info("memory")
    except redis.ResponseError:  # managed servers and ACL users may not ask
        return Finding(
            "redis", True, "it answers; whether it may evict keys or is full it does not say"
        )
    except redis.RedisError as error:
        return Finding(
            "redis", False, f"it does not answer ({type(error).__name__})", ADVICE["redis"]
        )
    policy, limit_bytes = memory.get("maxmemory_policy", "noeviction"), memory.get("maxmemory", 0)
    if policy != "noeviction":
        return Finding("redis", False, f"it evicts keys ({policy})", EVICTION_ADVICE)
    share = memory.get("used_memory", 0) / limit_bytes if limit_bytes else 0
    if share >= FULL_SHARE:
        advice = "raise maxmemory, or find out what else is kept there: a full Redis refuses pushes"
        return Finding("redis", False, f"{share:.0%} of its memory is used", advice)
    return Finding("redis", True, "it answers, evicts nothing and has room")


def _examine_database(settings: Settings) -> Finding:
    from imagepipeline.stores.catalogue import Catalogue

    catalogue = Catalogue(settings.database_url)
    catalogue.check()
    counts = catalogue.count()
    return Finding(
        "database",
        True,
        f"it answers; {sum(counts.values())} images, {counts['failed']} of them failed",
    )


def _examine_storage(settings: Settings) -> Finding:
    from imagepipeline.storage import open_storage

    if "://" not in settings.storage and not Path(settings.storage).exists():
        return Finding("storage", False, f"there is no folder {settings.storage}", START)
    files = open_storage(settings.storage)
    name = f"variants/.doctor-{os.getpid()}"
    files.write(name, b"doctor")
    is_same = files.read(name) == b"doctor"
    files.delete(name)
    free_bytes = files.free_bytes
    if not is_same:
        return Finding(
            "storage", False, "what was written was read back differently", ADVICE["storage"]
        )
    if free_bytes is None:
        return Finding("storage", True, "the bucket can be written and read")
    if free_bytes < MIN_FREE_BYTES:
        return Finding(
            "storage",
            False,
            f"only {free_bytes / 1e9:.1f} GB are free",
            "make room; paused images wait for it",
        )
    return Finding(
        "storage", True, f"it can be written and read; {free_bytes / 1e9:.0f} GB are free"
    )


def _has_index(settings: Settings) -> bool:
    return (
        "://" in settings.index_uri or Path(settings.index_uri).exists()
    )  # to open it would make it


def _examine_index(settings: Settings) -> Finding:
    from imagepipeline.index import open_index

    if not _has_index(settings):
        return Finding("index", True, "there is none yet; the first upload makes it")
    return Finding(
        "index",
        True,
        f"it can be read; {open_index(settings.index_uri).count_rows()} embeddings",
    )


def _examine_clock(settings: Settings) -> Finding:
    import redis

    from imagepipeline.stores.connection import connect

    client = connect(settings.redis_url)
    try:
        seconds, microseconds = client.time()
    except redis.RedisError as error:
        return Finding(
            "clock",
            False,
            f"Redis cannot be asked the time ({type(error).__name__})",
            ADVICE["clock"],
        )
    skew_seconds = abs(time.time() - seconds - microseconds / 1e6)
    if skew_seconds > MAX_CLOCK_SKEW_SECONDS:
        advice = "synchronise both by NTP: rate limits and waits are counted by these clocks"
        return Finding(
            "clock", False, f"this machine and Redis disagree by {skew_seconds:.1f} s", advice
        )
    return Finding("clock", True, "this machine and Redis agree")


def _examine_limits(settings: Settings) -> Finding:
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if open_files < MIN_OPEN_FILES:
        return Finding(
            "limits",
            False,
            f"only {open_files} files may be open",
            f"`ulimit -n {MIN_OPEN_FILES}` or more",
        )
    if address_space != resource.RLIM_INFINITY and address_space < 4 * settings.max_memory_bytes:
        return Finding(
            "limits",
            False,
            f"the address space is limited to {address_space / 1e9:.1f} GB",
            "`ulimit -v unlimited`",
        )
    return Finding("limits", True, f"{open_files} files may be open, memory is not limited")


def _examine_prices(settings: Settings) -> Finding:
    from imagepipeline import providers

    if problem := providers.explain_unpriced_models(settings):
        sentence, _, advice = problem.partition(": ")
        advice += "; where the provider itself reports costs, unset the budget for the first call"
        return Finding("prices", False, sentence, advice)
    if not (settings.daily_budget_usd or settings.monthly_budget_usd):
        return Finding("prices", True, "no budget is set")
    return Finding("prices", True, "the price of every model is known, so budgets hold")


def _examine_sandbox(settings: Settings) -> Finding:
    from contextlib import closing

    from imagepipeline.imaging.sandbox import Zygote

    with closing(Zygote()) as zygote:
        confinement = zygote.prepare()
    sentence = f"of a process that decodes, {confinement.describe()}"
    if not confinement.has_seccomp:
        consequence = (
            "images wait"
            if settings.require_confinement
            else "a decoder that is broken into gets all"
        )
        return Finding(
            "sandbox",
            False,
            f"{sentence}: {consequence}",
            "run on Linux, on x86_64 or aarch64, and where a container forbids seccomp, allow it: docs/security.md",
        )
    return Finding("sandbox", True, sentence)


def _examine_vision(settings: Settings) -> Finding:
    if not settings.has_remote_vision:
        return Finding("vision model", True, "the local one is used: no key, no network, no cost")
    from PIL import Image

    from imagepipeline import providers

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "#3060c0").save(buffer, "JPEG")
    facts = PixelFacts(32, 32, (("blue", "#3060c0", 1.0),), 40, 0, 50, -50)
    model = providers.build_vision(settings)
    problems: list[str] = []
    with providers.open_paid_calls(settings) as paid_calls:
        while True:
            try:
                answer, receipt = paid_calls.make(
                    None, "doctor", model.recipe, lambda: model.describe(buffer.getvalue(), facts)
                )
                break
            except FormatRefusedError as error:  # the model leaves it out when it is asked again
                if len(problems) == MAX_QUESTIONS - 1:
                    raise
                problems.append(str(error))
    sentence = f"{settings.vision_model} answers in {receipt.seconds:.1f} s: {answer.metadata.description[:60]!r}"
    if problems:
        advice = "set IMAGEPIPELINE_ANSWER_FORMAT to what it knows, or images cost calls that only find this out"
        return Finding("vision model", False, f"{sentence}; but {'; '.join(problems)}", advice)
    return Finding("vision model", True, sentence)


def _examine_embedder(settings: Settings) -> Finding:
    from imagepipeline import providers
    from imagepipeline.index import open_index

    embedder = providers.build_embedder(settings)
    with providers.open_paid_calls(settings) as paid_calls:
        embedding, receipt = paid_calls.make(
            None, "doctor", embedder.recipe, lambda: embedder.embed("a cat")
        )
    dimensions = len(embedding.vector)
    known = (
        open_index(settings.index_uri).list_dimensions(embedding.version)
        if _has_index(settings)
        else []
    )
    if known and dimensions not in known:
        advice = "the model behind the name has changed: use another name, and materialize `embedding` of all images"
        sentence = f"it gives {dimensions} dimensions, the index holds {known[0]}"
        return Finding("embedding model", False, sentence, advice)
    if not settings.has_remote_embedder:
        return Finding(
            "embedding model",
            True,
            f"the local one is used, {dimensions} dimensions: no key, no cost",
        )
    sentence = f"{settings.embedding_model} answers in {receipt.seconds:.1f} s, with {dimensions} dimensions"
    return Finding("embedding model", True, sentence)


def _examine_pauses(settings: Settings) -> Finding:
    from imagepipeline.stores.catalogue import Catalogue
    from imagepipeline.stores.ledger import Ledger

    Catalogue(settings.database_url).check()
    pauses = Ledger(settings.database_url).list_pauses()
    if pauses:
        advice = "mend the cause, then `imagepipeline resume`"
        return Finding(
            "pauses",
            False,
            f"paid work is paused ({pauses[0].reason}): {pauses[0].message}",
            advice,
        )
    return Finding("pauses", True, "nothing is paused")
