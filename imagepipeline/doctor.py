"""The doctor: checks everything the pipeline depends on and advises what to do about problems."""

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

from imagepipeline.advice import explain_languages, explain_unpriced_models
from imagepipeline.errors import (
    FormatRefusedError,
    ImagePipelineError,
    PausedError,
    PostponedError,
    RedisClusterError,
    StackError,
)
from imagepipeline.homes import find_faults
from imagepipeline.models import PixelFacts, Recipe
from imagepipeline.settings import Settings

MAX_CLOCK_SKEW_SECONDS = 2
MAX_EVENT_AGE_SECONDS = 60  # then the stream should have got it long ago
MIN_FREE_BYTES = 2_000_000_000
MIN_OPEN_FILES = 1024
MAX_VISION_CALLS = 5
FULL_SHARE = 0.9  # of Redis's maxmemory
FLOOD_ADVICE = "fix the uploader, then run `imagepipeline failed discard --reason unreadable`"
EVICTION_ADVICE = "set maxmemory-policy to noeviction; otherwise uploads may be lost"


@dataclass(frozen=True)
class Finding:
    """The result of one check; `advice` says what to do, and is empty if all is well."""

    name: str
    is_well: bool
    sentence: str
    advice: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Yields the finding of each check in turn.

    The checks of remote models make a tiny call to each provider, who may charge for it.
    """
    # Cached, because two checks need the answer and it takes a process that imports Dagster.
    ask_dagster = functools.cache(lambda: _ask_dagster(settings))
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
        "supervisor": _examine_supervisor,
        "code server": _examine_code_server,
        "workers": _examine_workers,
        "daemon": lambda _: _examine_daemon(ask_dagster()),
        "sensors": lambda _: _examine_sensors(ask_dagster()),
        "webserver": _examine_webserver,
        "vision model": _examine_vision,
        "embedding model": _examine_embedder,
        "pauses": _examine_pauses,
        "events": _examine_events,
    }
    for name, check in checks.items():
        try:
            yield check(settings)
        except Exception as error:  # the other checks must still run
            # Messages of other libraries may quote settings, so only our own are shown.
            sentence = (
                str(error)
                if isinstance(error, ImagePipelineError)
                else f"the check failed with {type(error).__name__}"
            )
            is_elsewhere = isinstance(error, PostponedError) and not isinstance(error, PausedError)
            yield Finding(name, False, sentence, "fix that first" if is_elsewhere else ADVICE[name])


START = "start the stack with `imagepipeline up`"
ADVICE = {
    "home": "set IMAGEPIPELINE_HOME to a folder that this user owns",
    "supervisor": START,
    "code server": f"{START}; if it has ended, its log says why",
    "workers": (
        f"{START}, or a single worker with `imagepipeline service worker`; "
        "if one has ended, its log says why"
    ),
    "daemon": f"{START}; if it has ended, its log says why",
    "sensors": START,
    "webserver": f"{START}; if it has ended, its log says why",
    "redis": f"{START}, or correct REDIS_URL",
    "database": f"{START}, or correct DATABASE_URL",
    "storage": "set IMAGEPIPELINE_STORAGE_ROOT to a folder that this user may write to",
    "index": (
        "repair or restore the folder `lancedb` in IMAGEPIPELINE_HOME, "
        "or materialize `embedding` again"
    ),
    "clock": "start Redis first",
    "limits": "check `ulimit -a`",
    "prices": "correct IMAGEPIPELINE_PRICES",
    "sandbox": "check whether memory is short, or reinstall the package",
    "vision model": "correct OPENAI_BASE_URL, OPENAI_API_KEY or IMAGEPIPELINE_VISION_MODEL",
    "embedding model": (
        "correct OPENROUTER_BASE_URL, OPENROUTER_API_KEY or IMAGEPIPELINE_EMBEDDING_MODEL"
    ),
    "pauses": START,
    "events": START,
}


def _examine_home(settings: Settings) -> Finding:
    home = settings.home
    if not home.is_dir():
        return Finding("home", False, f"{home} does not exist", START)
    for fault in find_faults(settings):
        return Finding("home", False, fault.sentence, fault.advice)
    with tempfile.TemporaryFile(dir=home):
        pass
    free_bytes = shutil.disk_usage(home).free
    if free_bytes < MIN_FREE_BYTES:
        return Finding(
            "home",
            False,
            f"only {free_bytes / 1e9:.1f} GB are free in {home}",
            "free some disk space",
        )
    return Finding(
        "home",
        True,
        f"{home} is writable, by its owner only; {free_bytes / 1e9:.0f} GB are free",
    )


def _examine_supervisor(settings: Settings) -> Finding:
    from imagepipeline.runtime import supervisor

    state = supervisor.find_running(settings)
    if state is not None:
        return Finding("supervisor", True, f"process {state['pid']} supervises the services")
    if settings.dagster_database_url:
        return Finding("supervisor", True, "not needed: the services run by themselves")
    return Finding("supervisor", False, "no stack runs in this home", ADVICE["supervisor"])


def _examine_code_server(settings: Settings) -> Finding:
    from imagepipeline.runtime import services

    if settings.dagster_database_url and not settings.code_address.exists():
        return Finding(
            "code server",
            True,
            "not checked, because none runs on this machine: "
            "run `imagepipeline service code-server --check` where it runs",
        )
    if not services.answers_grpc(settings.code_address):
        return Finding("code server", False, "it does not answer", ADVICE["code server"])
    return Finding("code server", True, "it answers")


def _examine_workers(settings: Settings) -> Finding:
    from imagepipeline import machines
    from imagepipeline.runtime import services

    names = services.list_workers(settings)
    if not names:
        return Finding("workers", False, "none answers, so no run can start", ADVICE["workers"])
    with machines.leave_mark(settings) as mark:
        answers = services.ask_workers(
            settings, machines.COMMAND, {"mark": mark}, names, services.WORK_SECONDS
        )
    differences = [
        f"{name} did not describe its configuration" for name in names if name not in answers
    ]
    differences += machines.find_differences(settings, answers)
    if differences:
        advice = (
            "give all machines the same settings and versions, and restart the stack after a "
            "change; docs/operations.md lists what they must share"
        )
        return Finding("workers", False, "; ".join(differences), advice)
    if silent := machines.find_silent(answers):
        advice = (
            "the worker starts a resident again by itself, or its log says why not; "
            "restart the worker if its zygote is gone"
        )
        return Finding("workers", False, "; ".join(silent), advice)
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
        advice = f"start more workers, or set IMAGEPIPELINE_MAX_RUNS to {slots}"
        return Finding(
            "workers",
            False,
            f"{settings.max_runs} runs may run at once, but there are only {slots} slots: "
            f"{sentence}",
            advice,
        )
    return Finding(
        "workers",
        True,
        f"all answer, also their residents and zygotes, and share their configuration: {sentence}",
    )


def _examine_daemon(examined: Mapping[str, Mapping[str, str]]) -> Finding:
    parts = examined["daemon"]
    if problems := _list_problems(parts):
        is_down = all(parts.values())  # then all say about the same
        sentence = f"it {min(parts.values())}" if is_down else "; ".join(problems)
        return Finding("daemon", False, sentence, ADVICE["daemon"])
    return Finding("daemon", True, "all its parts have sent a recent heartbeat")


def _examine_sensors(examined: Mapping[str, Mapping[str, str]]) -> Finding:
    if problems := _list_problems(examined["sensors"]):
        return Finding(
            "sensors",
            False,
            "; ".join(problems),
            "fix this soon: without its sensors, the pipeline starts, recovers and reports nothing",
        )
    return Finding("sensors", True, "all run without failures")


def _ask_dagster(settings: Settings) -> dict[str, dict[str, str]]:
    from imagepipeline.runtime import services

    if not settings.dagster_database_url and not (settings.home / "dagster" / "storage").is_dir():
        raise StackError("this home has no Dagster instance yet")
    return services.examine_daemon(settings)


def _list_problems(problems: Mapping[str, str]) -> list[str]:
    return [f"{name} {problem}" for name, problem in problems.items() if problem]


def _examine_webserver(settings: Settings) -> Finding:
    from imagepipeline.runtime import services, supervisor

    state = supervisor.find_running(settings)
    url = (state or {}).get("webserver_url")
    if url is None and settings.dagster_database_url:
        return Finding(
            "webserver",
            True,
            "not checked, because none runs on this machine: "
            "run `imagepipeline service webserver --check` where it runs",
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
            "redis", False, str(error), "set REDIS_URL to a server that is not part of a cluster"
        )
    if dropped:
        return Finding(
            "redis",
            False,
            f"{dropped} unreadable entries were dropped because the list of them was full",
            FLOOD_ADVICE,
        )
    client = connect(settings.redis_url)
    try:
        client.ping()
        memory = client.info("memory")
    except redis.ResponseError:  # managed servers and ACLs may forbid INFO
        return Finding(
            "redis", True, "it answers, but does not reveal its eviction policy and memory use"
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
        advice = (
            "raise maxmemory, or find out what else is stored there: a full Redis refuses pushes"
        )
        return Finding("redis", False, f"{share:.0%} of its memory is used", advice)
    return Finding("redis", True, "it answers, evicts nothing and has free memory")


def _examine_database(settings: Settings) -> Finding:
    from imagepipeline.stores.catalogue import Catalogue

    catalogue = Catalogue(settings.database_url)
    catalogue.check()
    counts = catalogue.count()
    return Finding(
        "database",
        True,
        f"it answers; {sum(counts.values())} images, of which {counts['failed']} failed",
    )


def _examine_storage(settings: Settings) -> Finding:
    from imagepipeline.storage import open_storage

    if "://" not in settings.storage and not Path(settings.storage).exists():
        return Finding("storage", False, f"{settings.storage} does not exist", START)
    files = open_storage(settings.storage)
    name = f"variants/.doctor-{os.getpid()}"
    files.write(name, b"doctor")
    is_same = files.read(name) == b"doctor"
    files.delete(name)
    free_bytes = files.free_bytes
    if not is_same:
        return Finding(
            "storage", False, "a test file came back with other content", ADVICE["storage"]
        )
    if free_bytes is None:
        return Finding("storage", True, "the bucket is readable and writable")
    if free_bytes < MIN_FREE_BYTES:
        return Finding(
            "storage",
            False,
            f"only {free_bytes / 1e9:.1f} GB are free",
            "free some disk space; images wait until there is enough",
        )
    return Finding(
        "storage", True, f"it is readable and writable; {free_bytes / 1e9:.0f} GB are free"
    )


def _has_index(settings: Settings) -> bool:
    # Opening the index would create it.
    return "://" in settings.index_uri or Path(settings.index_uri).exists()


def _examine_index(settings: Settings) -> Finding:
    from imagepipeline.index import open_index
    from imagepipeline.providers import build_recipes

    recipe = build_recipes(settings)["embedding"]
    embedded_count = _count_embedded(settings, recipe)  # first, as more may follow
    has_index = _has_index(settings)
    count = open_index(settings.index_uri).count_rows(recipe.version) if has_index else 0
    if count < embedded_count:
        return Finding(
            "index",
            False,
            f"search misses {embedded_count - count} of {embedded_count} images: their vectors are "
            "not in it",
            "give all workers the same index (IMAGEPIPELINE_INDEX_ROOT), or restore it; then push "
            "the images again, which makes what is missing, and what is outdated",
        )
    if not has_index:
        return Finding("index", True, "it does not exist yet; the first upload creates it")
    return Finding("index", True, f"it is readable; {count} embeddings of today's model")


def _count_embedded(settings: Settings, recipe: Recipe) -> int:
    """How many images have a current vector by the catalogue; 0 if that does not answer."""
    from imagepipeline.stores.catalogue import Catalogue
    from imagepipeline.stores.plans import Plans

    try:
        Catalogue(settings.database_url).check()
        plans = Plans(settings.database_url)
        outdated = sum(one.images for one in plans.count_outdated({"embedding": recipe}))
        return plans.count_all() - outdated
    except (StackError, PostponedError):  # the check of the database says so
        return 0


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
            f"Redis does not answer with its time ({type(error).__name__})",
            ADVICE["clock"],
        )
    skew_seconds = abs(time.time() - seconds - microseconds / 1e6)
    if skew_seconds > MAX_CLOCK_SKEW_SECONDS:
        advice = "synchronise both clocks by NTP: rate limits and waits depend on them"
        return Finding(
            "clock", False, f"this machine and Redis differ by {skew_seconds:.1f} s", advice
        )
    return Finding("clock", True, "this machine and Redis agree")


def _examine_limits(settings: Settings) -> Finding:
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if open_files < MIN_OPEN_FILES:
        return Finding(
            "limits",
            False,
            f"a process may open only {open_files} files",
            f"run `ulimit -n {MIN_OPEN_FILES}`, or set a higher limit",
        )
    if address_space != resource.RLIM_INFINITY and address_space < 4 * settings.max_memory_bytes:
        return Finding(
            "limits",
            False,
            f"the address space is limited to {address_space / 1e9:.1f} GB",
            "run `ulimit -v unlimited`",
        )
    return Finding("limits", True, f"{open_files} open files, enough address space")


def _examine_prices(settings: Settings) -> Finding:
    if problem := explain_unpriced_models(settings):
        sentence, _, advice = problem.partition(": ")
        advice += "; if the provider reports costs itself, unset the budget for the first call"
        return Finding("prices", False, sentence, advice)
    if not settings.has_budgets:
        return Finding("prices", True, "no budget is set")
    return Finding("prices", True, "the price of every model is known, so budgets can be kept")


def _examine_sandbox(settings: Settings) -> Finding:
    from contextlib import closing

    from imagepipeline.imaging.sandbox import Zygote

    with closing(Zygote()) as zygote:
        confinement = zygote.prepare()
    sentence = f"in a decoder, {confinement.describe()}"
    if not confinement.has_seccomp:
        consequence = (
            "images wait"
            if settings.require_confinement
            else "a hijacked decoder could do anything this user may do"
        )
        return Finding(
            "sandbox",
            False,
            f"{sentence}: {consequence}",
            "run on Linux on x86_64 or aarch64, and if a container forbids seccomp, allow it: "
            "see docs/security.md",
        )
    return Finding("sandbox", True, sentence)


def _examine_vision(settings: Settings) -> Finding:
    if not settings.has_remote_vision:
        if problem := explain_languages(settings):
            sentence, _, advice = problem.partition(": ")
            return Finding("vision model", False, sentence, advice)
        return Finding("vision model", True, "the local model is used: no key, network or cost")
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
            except FormatRefusedError as error:  # the next call leaves out the refused parameter
                if len(problems) == MAX_VISION_CALLS - 1:
                    raise
                problems.append(str(error))
    sentence = (
        f"{settings.vision_model} answered in {receipt.seconds:.1f} s: "
        f"{answer.metadata.description[:60]!r}"
    )
    if problems:
        advice = (
            "set IMAGEPIPELINE_ANSWER_FORMAT to a format the model supports; "
            "otherwise calls are wasted on finding out"
        )
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
        advice = (
            "the model behind this name has changed: "
            "set another name, and materialize `embedding` for all images"
        )
        sentence = f"the model returns {dimensions} dimensions, but the index holds {known[0]}"
        return Finding("embedding model", False, sentence, advice)
    if not settings.has_remote_embedder:
        return Finding(
            "embedding model",
            True,
            f"the local model is used, with {dimensions} dimensions: no key, network or cost",
        )
    sentence = (
        f"{settings.embedding_model} answered in {receipt.seconds:.1f} s "
        f"with {dimensions} dimensions"
    )
    return Finding("embedding model", True, sentence)


def _examine_pauses(settings: Settings) -> Finding:
    from imagepipeline.stores.catalogue import Catalogue
    from imagepipeline.stores.ledger import Ledger

    Catalogue(settings.database_url).check()
    ledger = Ledger(settings.database_url)
    if full := ledger.find_full_pause():
        advice = "run `imagepipeline resume` if the reason is gone"
        return Finding("pauses", False, f"a person has paused all work: {full.message}", advice)
    pauses = ledger.list_pauses()
    if pauses:
        advice = "fix the cause, then run `imagepipeline resume`"
        return Finding(
            "pauses",
            False,
            f"paid work is paused ({pauses[0].reason}): {pauses[0].message}",
            advice,
        )
    return Finding("pauses", True, "nothing is paused")


def _examine_events(settings: Settings) -> Finding:
    from imagepipeline.models import now_utc
    from imagepipeline.opening import open_events

    log = open_events(settings)
    waiting = log.list_unsent(1)
    if waiting and (now_utc() - waiting[0].at).total_seconds() > MAX_EVENT_AGE_SECONDS:
        return Finding(
            "events",
            False,
            f"they have waited for the Redis stream since {waiting[0].at:%F %T} UTC",
            f"{START} and Redis; the page of event_sensor in the UI says what is wrong",
        )
    webhook = log.find_webhook()
    if webhook and webhook.failures:
        return Finding(
            "events",
            False,
            f"the webhook failed {webhook.failures} times in a row: {webhook.problem}",
            "repair it; it gets what it has missed within a day, and `imagepipeline events --dead` "
            "lists what is older",
        )
    return Finding(
        "events", True, "the stream has all" + (", the webhook works" if webhook else "")
    )
