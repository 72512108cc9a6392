"""Every knob, validated once. The only module that reads the environment.

A setting's alias is its environment variable, IMAGEPIPELINE_ and its name unless said otherwise;
its description is the text of docs/settings.md.
"""

import difflib
import hashlib
import ipaddress
import json
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qsl, quote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
)

from imagepipeline import settings_file
from imagepipeline.errors import InvalidUploadError, SettingsError
from imagepipeline.imaging.limits import CPU_SECONDS, MEMORY_BYTES, Rules
from imagepipeline.languages import DEFAULT, parse_languages
from imagepipeline.models import MAX_SIDE_PX, VariantSpec, build_variant_specs, check_tenant
from imagepipeline.output_formats import AVIF, DEFAULT_QUALITY, OUTPUT_FORMATS, WEBP
from imagepipeline.prices import MAX_USD
from imagepipeline.rates import DEFAULT_RATE_LIMIT, EXAMPLES, parse_limits
from imagepipeline.settings_file import PREFIX, name_key
from imagepipeline.variant_settings import parse_variants

OPENAI_URL, OPENROUTER_URL = "https://api.openai.com/v1", "https://openrouter.ai/api/v1"
NO_KEY = "none"  # what servers that need no key are sent as one
# macOS allows 104 bytes for a socket's path, Linux 108; the longest name there, multiprocessing's,
# has 32.
MAX_SOCKET_FOLDER_BYTES = 70
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Kubernetes and Docker links set these for each service; one named redis sets REDIS_PORT=tcp://….
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
LINK_NAME = re.compile(
    r"_SERVICE_HOST$|_SERVICE_PORT(_[A-Z0-9_]+)?$|_PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?$"
)
LINK_ADDRESS = re.compile(r"(tcp|udp|sctp)://[^/]+:\d+")
# The prefixes to ignore: ours, and Dagster's, which would parse DAGSTER_GRPC_PORT as a number.
LINKED = ("IMAGEPIPELINE_", "REDIS_", "DAGSTER_")
SQLITE_PARAMETERS = {"timeout", "check_same_thread", "cached_statements"}


def _check_redis_url(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("must start with redis://, rediss:// or unix://")
    return value


def _check_database_url(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().startswith(
        ("sqlite:///", "postgresql://", "postgres://", "postgresql+psycopg2://")
    ):
        raise ValueError("must start with sqlite:/// or postgresql://")
    url = value.get_secret_value()
    _check_parameters(url)
    if not url.startswith("sqlite"):
        return value
    path, mark, query = url.removeprefix("sqlite:///").partition("?")
    if not path or path.startswith((":memory:", "file:")):
        raise ValueError("must name a file: sqlite:////folder/catalogue.sqlite")
    # Absolute, as our processes have different working directories.
    return SecretStr(f"sqlite:///{Path(path).absolute()}{mark}{query}")


def _check_parameters(url: str) -> None:
    """Refuses parameters that the driver rejects only when it connects, such as `schema`."""
    names = [name for name, _ in parse_qsl(url.partition("?")[2], keep_blank_values=True)]
    is_known = SQLITE_PARAMETERS.__contains__ if url.startswith("sqlite") else _is_known_to_postgres
    unknown = [name for name in names if not is_known(name)]
    if unknown:
        raise ValueError(f"has a parameter the driver does not know, {unknown[0]!r:.40}: remove it")


def _is_known_to_postgres(name: str) -> bool:
    from psycopg2 import ProgrammingError  # type: ignore[import-untyped]
    from psycopg2.extensions import parse_dsn  # type: ignore[import-untyped]

    try:
        parse_dsn(f"postgresql://host/database?{quote(name)}=1")
    except ProgrammingError:
        return False
    return True


def _check_home(value: Path) -> Path:
    home = value.expanduser().absolute()
    # In the URL of a SQLite file, parameters begin at a question mark.
    if re.search(r"[?\x00-\x1f]", str(home)):
        raise ValueError(f"must have no question mark or control character: {str(home)!r}")
    return home


def _check_postgres_url(value: SecretStr) -> SecretStr:
    url = value.get_secret_value()
    if not url.startswith(("postgresql://", "postgres://", "postgresql+psycopg2://")):
        raise ValueError("must start with postgresql://")
    _check_parameters(url)
    # SQLAlchemy has no postgres://, and from 2.1 another driver for postgresql:// than Dagster.
    return SecretStr(re.sub("^[a-z0-9+]+", "postgresql+psycopg2", url))


def _check_storage_root(value: str) -> str:
    if "://" in value and not re.match(r"(file:///|(s3|gs|az)://[^/]+)", value):
        raise ValueError("must be a folder, or start with file:///, s3://, gs:// or az://")
    return value


def _check_http_url(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("must start with http:// or https://")
    return value.rstrip("/")


def _check_webhook_url(value: SecretStr) -> SecretStr:
    try:
        is_whole = (
            bool(urlsplit(value.get_secret_value()).hostname)
            and urlsplit(value.get_secret_value()).port != 0
        )
    except ValueError:  # of brackets, or of the port
        is_whole = False
    if not is_whole:
        raise ValueError("must be an address such as https://example.com/hook")
    return value


def _check_rate_limit(value: str) -> str:
    try:
        parse_limits(value)
    except SettingsError:  # which quotes the value, as no message about a setting may
        raise ValueError(f"must look like {EXAMPLES}") from None
    return value


def _split_words(value: Any) -> Any:
    if isinstance(value, list) and any(isinstance(word, str) and "," in word for word in value):
        raise ValueError("must have no comma in a word")
    return (
        tuple(word.strip() for word in value.split(",") if word.strip())
        if isinstance(value, str)
        else value
    )


def _parse_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _read_variants(value: Any) -> tuple[VariantSpec, ...]:
    try:
        return parse_variants(_parse_json(value))
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON, at character {error.pos + 1}") from None


def _check_tenant_or_others(name: str) -> str:
    """Checks a key of a setting for tenants; `*` stands for those that are not named."""
    try:
        return name if name == "*" else check_tenant(name)
    except InvalidUploadError as error:
        raise ValueError(str(error)) from None


Words = Annotated[tuple[str, ...], BeforeValidator(_split_words)]
Variants = Annotated[tuple[VariantSpec, ...], BeforeValidator(_read_variants)]
Price = Annotated[float, Field(ge=0, le=MAX_USD)]
HttpUrl = Annotated[str, AfterValidator(_check_http_url)]
Quality = Annotated[int, Field(ge=1, le=100)]
Positive = Annotated[int, Field(ge=1)]
Tenant = Annotated[str, AfterValidator(_check_tenant_or_others)]


def check_days(least: float) -> AfterValidator:
    """Checks a number of days: 0, or at least so many."""

    def check(days: float) -> float:
        if days and days < least:
            raise ValueError(f"must be 0 or at least {least:g}")
        return days

    return AfterValidator(check)


Days = Annotated[float, Field(ge=0, le=36_500)]
Hours = Annotated[float, Field(gt=0, le=876_000)]  # of a hundred years, like the days
Provider = Literal["auto", "local", "remote"]
Port = Annotated[int, Field(ge=1, le=65535)]


@dataclass(frozen=True)
class Stated:
    """A setting as a person reads it.

    Attributes:
        key: its name in the settings file; None for a secret, which is never in it.
        variable: its environment variable.
        value: JSON; None if it is unset, and asterisks instead of a secret.
        source: `default`, `file` or `environment`.
    """

    key: str | None
    variable: str
    value: Any
    source: str


class Settings(BaseModel):
    """All settings, with their defaults: nothing needs to be set for a local stack."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        allow_inf_nan=False,
        alias_generator=lambda name: PREFIX + name.upper(),
    )
    # What the file says, as variables; only what the environment does not say itself.
    _from_file: dict[str, str] = PrivateAttr(default_factory=dict)

    config: Path | None = Field(
        None,
        description="The settings file. Unset: `imagepipeline.toml` in the working directory, if "
        "there is one.",
    )
    home: Annotated[Path, AfterValidator(_check_home)] = Field(
        Path(".imagepipeline"),
        description="The folder that holds all state of the local stack.",
        validate_default=True,
    )
    storage_root: Annotated[str, AfterValidator(_check_storage_root)] | None = Field(
        None,
        description="The folder that holds `original/` and `variants/`, or its URL: `file://`, "
        "`s3://`, `gs://` or `az://`. Unset: `storage` in the home.",
    )
    explicit_redis_url: Annotated[SecretStr, AfterValidator(_check_redis_url)] | None = Field(
        None,
        alias="REDIS_URL",
        description="The Redis or Valkey server to use. Unset: the stack starts its own.",
    )
    redis_host: str | None = Field(
        None,
        alias="REDIS_HOST",
        description="The host of the Redis server, instead of `REDIS_URL`.",
    )
    redis_port: Port | None = Field(
        None,
        alias="REDIS_PORT",
        description="The port of the Redis server, instead of `REDIS_URL`.",
    )
    queue_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9:_-]{1,64}$")] = Field(
        "image-processing", description="The first part of all Redis keys."
    )
    explicit_database_url: Annotated[SecretStr, AfterValidator(_check_database_url)] | None = Field(
        None,
        alias="DATABASE_URL",
        description="The catalogue's database: a `postgresql://` or `sqlite:///` URL. Unset: a "
        "SQLite file in the home.",
    )
    dagster_database_url: Annotated[SecretStr, AfterValidator(_check_postgres_url)] | None = Field(
        None,
        alias="DAGSTER_DATABASE_URL",
        description="Dagster's own Postgres database, which must not be the catalogue's. Unset: "
        "SQLite files in the home.",
    )
    max_runs: Annotated[int, Field(ge=1, le=100)] = Field(
        5, description="How many uploads are processed at the same time, by all workers together."
    )
    batch_size: Annotated[int, Field(ge=1, le=1000)] = Field(
        50,
        description="How many images a run of the bulk lane takes, such as for "
        "`imagepipeline apply`. It ends after a minute in any case.",
    )
    worker_slots: Annotated[int, Field(ge=1, le=100)] | None = Field(
        None,
        description="How many uploads one worker processes at the same time. Unset: "
        "`IMAGEPIPELINE_MAX_RUNS`.",
    )
    max_run_seconds: Annotated[int, Field(ge=10, le=86_400)] = Field(
        900,
        description="How long a run may take. Then its worker ends it, and another run takes the "
        "image; the third time, the image fails as `poison`.",
    )
    explicit_broker_url: Annotated[SecretStr, AfterValidator(_check_redis_url)] | None = Field(
        None,
        alias="IMAGEPIPELINE_BROKER_URL",
        description="The Redis server that hands runs to the workers. Unset: the one that holds "
        "the uploads.",
    )
    index_root: Annotated[str, AfterValidator(_check_storage_root)] | None = Field(
        None,
        description="The folder of the LanceDB index, or its URL. Unset: `lancedb` in the "
        "bucket, or in the home if files are on a disk.",
    )
    vision: Provider = Field(
        "auto",
        description="Which model describes images: `local`, `remote`, or `auto`, which means "
        "remote if a key or an address is set.",
    )
    embedding: Provider = Field(
        "auto",
        description="Which model embeds texts: `local`, `remote`, or `auto`, which means remote "
        "if a key or an address is set.",
    )
    allow_plain_http: bool = Field(
        False,
        description="Allows keys to be sent over plain HTTP, where anybody on the way can read "
        "them.",
    )
    openai_api_key: SecretStr | None = Field(
        None, alias="OPENAI_API_KEY", description="The key for the remote vision model."
    )
    openai_base_url: HttpUrl = Field(
        OPENAI_URL,
        alias="OPENAI_BASE_URL",
        description="The address of the vision model: any OpenAI-compatible API.",
    )
    vision_model: Annotated[str, Field(min_length=1, max_length=128)] = Field(
        "gpt-4o-mini", description="The name of the vision model."
    )
    vision_prompt: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="The prompt for the vision model. Unset: the built-in prompt."
    )
    vision_long_side_px: Annotated[int, Field(ge=64, le=2048)] = Field(
        1024, description="The long side, in pixels, of the copy sent to the vision model."
    )
    vision_detail: Literal["auto", "low", "high"] = Field(
        "auto",
        description="OpenAI's `detail` parameter: `auto`, `low` or `high`. `low` uses fewer "
        "tokens.",
    )
    answer_format: Literal["auto", "json_schema", "json_object", "text"] = Field(
        "auto",
        description="How the vision model is asked for JSON: `json_schema`, `json_object` or "
        "`text`. `auto` tries them in this order.",
    )
    vision_tags: Words = Field(
        (),
        alias="IMAGEPIPELINE_TAGS",
        description="The only allowed tags, comma-separated. Unset: any tag.",
    )
    vision_categories: Words = Field(
        (),
        alias="IMAGEPIPELINE_CATEGORIES",
        description="The only allowed categories, comma-separated; an answer that fits none "
        "becomes `other`. Unset: any category.",
    )
    languages: Annotated[Words, AfterValidator(parse_languages)] = Field(
        DEFAULT,
        description="The languages of descriptions, comma-separated, the most important first: "
        "BCP 47 tags such as `en,de,pt-BR`. With others than `en`, each language also gets an alt "
        "text of at most 125 characters.",
    )
    rate_limit: Annotated[str, AfterValidator(_check_rate_limit)] = Field(
        DEFAULT_RATE_LIMIT,
        description="The rate limit for paid calls: `10/minute` for all stages together, "
        "`metadata=10/minute,embedding=100/minute` for each stage, or `off`.",
    )
    prices: Annotated[dict[str, tuple[Price, Price]], BeforeValidator(_parse_json)] = Field(
        {"gpt-4o-mini": (0.15, 0.60), "openai/text-embedding-3-small": (0.02, 0.0)},
        description="Prices in US dollars per million input and output tokens, for providers "
        'that report no cost: `{"model": [0.15, 0.6]}`. What you set is added to '
        "the default.",
    )
    daily_budget_usd: Price | None = Field(
        None,
        description="The daily budget in US dollars. Once it is spent, paid work pauses until "
        "midnight UTC.",
    )
    monthly_budget_usd: Price | None = Field(
        None,
        description="The monthly budget in US dollars. Once it is spent, paid work pauses until "
        "the next month.",
    )
    tenant_daily_budgets_usd: Annotated[dict[Tenant, Price], BeforeValidator(_parse_json)] = Field(
        {},
        description="Daily budgets of tenants in US dollars, `*` for all others: "
        '`{"*": 1, "acme": 20}`. Once one is spent, that tenant\'s images get their variants, and '
        "the rest waits until midnight UTC.",
    )
    tenant_max_runs: Annotated[dict[Tenant, Positive], BeforeValidator(_parse_json)] = Field(
        {},
        description="How many images of a tenant may be in runs at once, `*` for all others: "
        '`{"*": 3, "acme": 5}`. Unset: tenants share the slots in turn.',
    )
    openrouter_api_key: SecretStr | None = Field(
        None, alias="OPENROUTER_API_KEY", description="The key for the remote embedding model."
    )
    openrouter_base_url: HttpUrl = Field(
        OPENROUTER_URL,
        alias="OPENROUTER_BASE_URL",
        description="The address of the embedding model: any OpenAI-compatible API.",
    )
    embedding_model: Annotated[str, Field(min_length=1, max_length=128)] = Field(
        "openai/text-embedding-3-small", description="The name of the embedding model."
    )
    variants: Variants = Field(
        (),
        description="The variants to make, as a JSON list; see [variants](variants.md). Without "
        "it, 640, 1024 and 1920 px wide as WebP and AVIF.",
    )
    webp_quality: Quality = Field(
        DEFAULT_QUALITY,
        description="The quality of WebP variants that have none of their own, 1 to 100.",
    )
    avif_quality: Quality = Field(
        DEFAULT_QUALITY,
        description="The same of AVIF variants. At 80 an AVIF looks better "
        "than the WebP and is larger; at 63 it looks the same and is smaller.",
    )
    animation: Literal["first-frame", "keep"] = Field(
        "first-frame",
        description="What becomes of an animation: `first-frame` for a still picture, or `keep` "
        "for animated variants.",
    )
    accept_truncated: bool = Field(
        False,
        description="Salvages truncated and damaged files instead of failing them. What cannot "
        "be read becomes grey.",
    )
    keep_copyright: bool = Field(False, description="Keeps artist and copyright in the variants.")
    compared_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05,
        description="The share of images, 0 to 1, of which all variants are decoded and compared "
        "with the original. Of the other images, the smallest variant of each format is.",
    )
    max_bytes: Positive = Field(Rules.max_bytes, description="The largest original, in bytes.")
    max_pixels: Positive = Field(
        Rules.max_pixels,
        description="The most pixels to decode, over all frames that are kept. A JPEG may have "
        "five times as many, because it is decoded at a reduced size.",
    )
    max_side_px: Annotated[int, Field(ge=1, le=MAX_SIDE_PX)] = Field(
        Rules.max_side_px,
        description="The longest side of a variant, in pixels. WebP allows no more.",
    )
    max_frames: Positive = Field(
        Rules.max_frames, description="The most frames of an animation that is kept."
    )
    max_icc_bytes: Positive = Field(
        Rules.max_icc_bytes, description="The largest colour profile, in bytes."
    )
    max_text_bytes: Positive = Field(
        Rules.max_text_bytes, description="The most text in a PNG, in bytes after decompression."
    )
    max_memory_bytes: Annotated[int, Field(ge=100_000_000)] = Field(
        MEMORY_BYTES, description="The memory for decoding and encoding one image, in bytes."
    )
    max_cpu_seconds: Positive = Field(
        CPU_SECONDS, description="The CPU time for decoding and encoding one image, in seconds."
    )
    require_confinement: bool = Field(
        False,
        description="Decodes nothing on a kernel that cannot filter the decoder's system calls; "
        "images wait.",
    )
    webserver_port: Port | None = Field(
        None,
        description="The port of the Dagster UI. Unset: 3000, or a free port if that is taken.",
    )
    webserver_host: Annotated[str, Field(min_length=1)] = Field(
        "127.0.0.1",
        description="The address on which the Dagster UI listens. The UI has no login: never "
        "choose an address that others can reach.",
    )
    webhook_url: Annotated[SecretStr, AfterValidator(_check_webhook_url)] | None = Field(
        None,
        description="The HTTPS address that is sent a POST of JSON about final failures and "
        "pauses.",
    )
    webhook_secret: Annotated[SecretStr, Field(min_length=16)] | None = Field(
        None, description="The secret that signs both webhooks' messages; at least 16 characters."
    )
    webhook_allow_private: bool = Field(
        False, description="Allows webhooks at private addresses or over plain HTTP."
    )
    event_webhook_url: Annotated[SecretStr, AfterValidator(_check_webhook_url)] | None = Field(
        None,
        description="The HTTPS address of your app that is sent a POST of JSON about each image "
        "that has its pictures, completes, fails or is erased.",
    )
    event_stream_length: Positive = Field(
        10_000,
        description="About how many events the Redis stream keeps. Each takes 1 to 3 kB of the "
        "server's memory.",
    )
    smtp_url: SecretStr | None = Field(
        None, description="The mail server for the same notices: `smtps://user:password@host:465`."
    )
    mail_from: str = Field("imagepipeline@localhost", description="The sender of these mails.")
    mail_to: str = Field("", description="The recipients of these mails, comma-separated.")
    list_completed_hours: Hours = Field(
        1, description="How many hours `imagepipeline list` shows completed images."
    )
    list_failed_hours: Hours = Field(
        24, description="How many hours `imagepipeline list` shows failed images."
    )
    keep_runs_days: Days = Field(
        7,
        alias="IMAGEPIPELINE_KEEP_RUNS_DAYS",
        description="After so many days the runs of an image leave Dagster with their logs. Its "
        "partition shows a short form of its results. 0 keeps all.",
    )
    keep_partitions: Annotated[int, Field(ge=0)] = Field(
        5000,
        alias="IMAGEPIPELINE_KEEP_PARTITIONS",
        description="How many images Dagster shows: the newest ones. Others leave it, and stay in "
        "the catalogue, the storage and search. More make its pages slow. 0 keeps all.",
    )
    keep_partitions_days: Days = Field(
        0,
        alias="IMAGEPIPELINE_KEEP_PARTITIONS_DAYS",
        description="After so many days an image leaves Dagster. 0 keeps all.",
    )
    keep_calls_days: Annotated[Days, check_days(32)] = Field(
        90,
        alias="IMAGEPIPELINE_KEEP_CALLS_DAYS",
        description="How many days each paid call is kept, at least 32; sums of costs are kept for "
        "ever. 0 keeps all.",
    )
    keep_notices_days: Annotated[Days, check_days(7)] = Field(
        30,
        alias="IMAGEPIPELINE_KEEP_NOTICES_DAYS",
        description="How many days sent notices are kept, at least 7. 0 keeps all.",
    )
    definitions: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*$")] = Field(
        "imagepipeline.definitions",
        description="The Python module with the Dagster definitions, which may add to ours. It "
        "must be installed or on PYTHONPATH.",
    )
    code_socket: Path | None = Field(
        None,
        description="the code server's socket, which Dagster looks for there",
        json_schema_extra={"internal": True},
    )
    resident_socket: Path | None = Field(
        None,
        description="the socket of the process that keeps index and models; a worker sets it "
        "for its runs",
        json_schema_extra={"internal": True},
    )

    @classmethod
    def load(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The settings of this process; an empty variable counts as unset.

        It also sets the umask, so that all files of the process are private from now on.

        Raises:
            SettingsError: names every malformed variable and what is wrong, but never its value.
        """
        known = {str(field.alias) for field in cls.model_fields.values()}
        secrets = _read_secrets(environment)
        links = {name for name, value in environment.items() if _is_service_link(name, value)}
        if environment is os.environ:  # Dagster, cloud libraries and our children read it
            # Every entry point calls this: its files, and those of libraries, are its owner's only.
            os.umask(0o077)
            os.environ.update(secrets | _build_no_proxy(environment))
            for name in {f"{name}_FILE" for name in SECRETS} | links:
                os.environ.pop(name, None)
        for name in environment.keys() - links:
            if name.startswith(PREFIX) and not (
                name in known or name.removesuffix("_FILE") in SECRETS
            ):
                raise SettingsError(f"{name} is not a setting{_suggest(name, known)}")
        told = {
            name: value
            for name, value in {**environment, **secrets}.items()
            if value and name not in links
        }
        path = settings_file.find(told.get(settings_file.CHOICE))
        from_file = cls._read_file(path) if path else {}
        told |= {settings_file.CHOICE: str(path)} if path else {}
        settings = cls._validate(from_file | told)
        settings._from_file = {name: value for name, value in from_file.items() if name not in told}
        if settings.explicit_redis_url and (settings.redis_host or settings.redis_port):
            raise SettingsError(
                "REDIS_URL and REDIS_HOST/REDIS_PORT exclude each other: unset one of them"
            )
        if (settings.webhook_url or settings.event_webhook_url) and not settings.webhook_secret:
            raise SettingsError(
                "IMAGEPIPELINE_WEBHOOK_SECRET is missing: what the webhook is sent must be signed"
            )
        if settings.smtp_url and not settings.mail_to:
            raise SettingsError(
                "IMAGEPIPELINE_MAIL_TO is missing: IMAGEPIPELINE_SMTP_URL has nobody to write to"
            )
        if _is_same_database(settings.dagster_database_url, settings.explicit_database_url):
            raise SettingsError(
                "DAGSTER_DATABASE_URL and DATABASE_URL must be two databases: each has its own "
                "migrations"
            )
        settings._check_keys()
        for spec in settings.variants:
            if max(spec.width_px, spec.height_px or 0) > settings.max_side_px:
                raise SettingsError(
                    f"IMAGEPIPELINE_VARIANTS: variant {spec.name}: a side may have "
                    f"{settings.max_side_px:,} px (IMAGEPIPELINE_MAX_SIDE_PX)"
                )
        return settings

    @classmethod
    def _validate(cls, values: Mapping[str, Any], rename: Callable[[str], str] = str) -> Self:
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [_explain(problem, rename) for problem in error.errors(include_input=False)]
            raise SettingsError("; ".join(problems)) from None

    @classmethod
    def _read_file(cls, path: Path) -> dict[str, str]:
        """What the settings file says, as variables. Its relative folders are beside it.

        Raises:
            SettingsError: it cannot be read, or says what it may not; the message names both.
        """
        allowed = {
            name_key(str(field.alias)): name
            for name, field in cls.model_fields.items()
            if not (field.json_schema_extra or field.alias in {*SECRETS, settings_file.CHOICE})
        }
        said = {key: value for key, value in settings_file.read(path).items() if value != ""}
        for key, value in said.items():
            for secret in SECRETS & {key.upper(), PREFIX + key.upper()}:
                raise SettingsError(
                    f"{path}: {key} is a secret, and many can read such a file: remove it, and set "
                    f"{secret} or {secret}_FILE in the environment"
                )
            if key not in allowed:
                similar = _suggest(name_key(key), allowed)
                raise SettingsError(f"{path}: {key!r:.60} is no setting of this file{similar}")
            if settings_file.find_text(value, lambda text: bool(PASSWORD.search(text))):
                raise SettingsError(
                    f"{path}: {key} has a password, and many can read such a file: set "
                    f"{cls.model_fields[allowed[key]].alias} in the environment"
                )
            if settings_file.find_text(value, lambda text: "\0" in text):
                raise SettingsError(f"{path}: {key}: must have no NUL character")
            if key in FOLDERS and isinstance(value, str) and "://" not in value:
                said[key] = str(path.parent / Path(value).expanduser())
        aliases = {key: str(cls.model_fields[name].alias) for key, name in allowed.items()}
        try:
            read = cls._validate({aliases[key]: said[key] for key in said}, name_key)
        except SettingsError as error:
            raise SettingsError(f"{path}: {error}") from None
        for key, value in said.items():
            made = getattr(read, allowed[key])
            fitting = (int, float) if type(made) is float else (type(made),)
            if isinstance(made, bool | int | float) and type(value) not in fitting:
                what = {bool: "true or false", int: "a whole number", float: "a number"}[type(made)]
                raise SettingsError(f"{path}: {key}: must be {what}, without quotes")
        return {aliases[key]: settings_file.to_variable(value) for key, value in said.items()}

    def state(self) -> Iterator[Stated]:
        """Each setting, its value and where it comes from; secrets are masked."""
        values = self.model_dump(mode="json")
        for name, field in Settings.model_fields.items():
            alias, value = str(field.alias), values[name]
            if field.json_schema_extra or name == "config":
                continue
            if isinstance(value, str) and re.fullmatch(r"\w+://\S*", value):
                value = re.sub(r"(?<=://)[^/@]*@|(?<=\?).*", "***", value)
            source = "environment" if name in self.model_fields_set else "default"
            yield Stated(
                None if alias in SECRETS else name_key(alias),
                alias,
                value,
                "file" if alias in self._from_file else source,
            )

    def _check_keys(self) -> None:
        for name, key, url in (
            ("OPENAI", self.openai_api_key, self.openai_base_url),
            ("OPENROUTER", self.openrouter_api_key, self.openrouter_base_url),
        ):
            if key and is_plain_http(url) and not self.allow_plain_http:
                raise SettingsError(
                    f"{name}_BASE_URL starts with http://, so {name}_API_KEY would be sent "
                    "unencrypted: use https://, unset the key, or set "
                    "IMAGEPIPELINE_ALLOW_PLAIN_HTTP=1"
                )

    def build_environment(self, **changes: str) -> dict[str, str]:
        """The environment for a process of this stack: ours, with the home's absolute path.

        It has what the settings file said, so that a later change of it reaches all or none.
        """
        told = {settings_file.CHOICE: os.devnull, "IMAGEPIPELINE_HOME": str(self.home)}
        return {**os.environ, **self._from_file, **told, **changes}

    def publish_resident_socket(self) -> None:
        """Tells this process and its children where the resident listens."""
        os.environ["IMAGEPIPELINE_RESIDENT_SOCKET"] = self.resident_address

    @property
    def has_remote_vision(self) -> bool:
        """Whether a remote model describes images: a key is set, or an address that needs none."""
        if self.vision == "auto":
            return self.openai_api_key is not None or self.openai_base_url != OPENAI_URL
        return self.vision == "remote"

    @property
    def has_remote_embedder(self) -> bool:
        """Whether a remote model embeds texts: a key is set, or an address that needs none."""
        if self.embedding == "auto":
            return self.openrouter_api_key is not None or self.openrouter_base_url != OPENROUTER_URL
        return self.embedding == "remote"

    @property
    def has_budgets(self) -> bool:
        """Whether there is a budget: of a day, of a month, or of a tenant."""
        budgets = (self.daily_budget_usd, self.monthly_budget_usd, self.tenant_daily_budgets_usd)
        return any(budgets)

    @property
    def all_prices(self) -> dict[str, tuple[float, float]]:
        """The built-in and configured prices: USD per million tokens in and out, by model."""
        known: dict[str, tuple[float, float]] = type(self).model_fields["prices"].default
        return known | self.prices

    @property
    def has_own_redis(self) -> bool:
        """Whether the local stack starts the Redis-compatible server itself."""
        return not (self.explicit_redis_url or self.redis_host or self.redis_port)

    @property
    def redis_url(self) -> str:
        """Where the Redis lists are; may hold a password."""
        if self.explicit_redis_url:
            return self.explicit_redis_url.get_secret_value()
        if self.has_own_redis:
            return f"unix://{quote(str(self.socket_folder / 'valkey.sock'))}?db=0"
        return f"redis://{self.redis_host or '127.0.0.1'}:{self.redis_port or 6379}/0"

    @property
    def broker_url(self) -> str:
        """The Redis through which runs reach the workers; may hold a password."""
        return (
            self.explicit_broker_url.get_secret_value()
            if self.explicit_broker_url
            else self.redis_url
        )

    @property
    def specs(self) -> tuple[VariantSpec, ...]:
        """The variants to make, each with its quality."""
        chosen = {WEBP.name: self.webp_quality, AVIF.name: self.avif_quality}
        if not self.variants:
            return build_variant_specs(*chosen.values())
        defaults = {one.name: one.default_quality for one in OUTPUT_FORMATS.values()} | chosen
        return tuple(
            replace(spec, quality=spec.quality or defaults[spec.format]) for spec in self.variants
        )

    @property
    def slots(self) -> int:
        """How many uploads the worker of this home processes at a time."""
        return self.worker_slots or self.max_runs

    @property
    def worker_name(self) -> str:
        """What Celery calls the worker of this home on this machine."""
        digest = hashlib.sha256(str(self.home).encode()).hexdigest()[:6]
        return f"imagepipeline-{digest}@{socket.gethostname()}"

    @property
    def database_url(self) -> str:
        """Where the catalogue is; may hold a password."""
        if self.explicit_database_url:
            return self.explicit_database_url.get_secret_value()
        return f"sqlite:///{self.home / 'catalogue.sqlite'}"

    @property
    def storage(self) -> str:
        """The storage root: the URL of a bucket, or an absolute folder."""
        root = (self.storage_root or str(self.home / "storage")).rstrip("/").removeprefix("file://")
        return root if "://" in root else str(Path(root).expanduser().absolute())

    @property
    def index_uri(self) -> str:
        """Where LanceDB keeps the embeddings: as set, or else in the home or in the bucket."""
        if self.index_root:
            root = self.index_root.rstrip("/").removeprefix("file://")
            return root if "://" in root else str(Path(root).expanduser().absolute())
        return f"{self.storage}/lancedb" if "://" in self.storage else str(self.home / "lancedb")

    @property
    def code_address(self) -> Path:
        """Where the code server listens."""
        return self.code_socket or self.socket_folder / "code.sock"

    @property
    def resident_address(self) -> str:
        """Where a worker has its resident listen."""
        return str(self.socket_folder / "resident.sock")

    @property
    def socket_folder(self) -> Path:
        """The folder of the stack's sockets: in the home, or in /tmp if that path is too long."""
        folder = self.home / "sockets"
        if len(os.fsencode(folder)) <= MAX_SOCKET_FOLDER_BYTES:
            return folder
        digest = hashlib.sha256(str(self.home).encode()).hexdigest()[:12]
        # `up` checks its owner.
        return Path(f"/tmp/imagepipeline-{os.getuid()}-{digest}")  # noqa: S108


FOLDERS = ("home", "storage_root", "index_root")
PASSWORD = re.compile(r"://[^/?#\s]*:[^/?#\s]*@")  # in an address
BUCKET_SECRETS = {
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AZURE_STORAGE_ACCOUNT_KEY", "GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_APPLICATION_CREDENTIALS"),
}
NOTIFIERS = {
    *("IMAGEPIPELINE_WEBHOOK_URL", "IMAGEPIPELINE_WEBHOOK_SECRET", "IMAGEPIPELINE_SMTP_URL"),
    "IMAGEPIPELINE_EVENT_WEBHOOK_URL",
}
SECRET_NAME = re.compile(
    r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|PGPASS|^CELERY_", re.IGNORECASE
)
SECRETS = {
    *(
        str(field.alias)
        for field in Settings.model_fields.values()
        if "SecretStr" in str(field.annotation)
    ),
    *BUCKET_SECRETS,
}


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_plain_http(url: str) -> bool:
    """Whether requests to the address cross a network unencrypted."""
    parts = urlsplit(url)
    return parts.scheme == "http" and not is_loopback(parts.hostname or "")


def is_secret(variable: str) -> bool:
    """Whether a variable's name says that it holds a secret, or the name of a file with one."""
    name = variable.removesuffix("_FILE")
    return name in SECRETS or SECRET_NAME.search(name) is not None


def adopt_environment(environment: Mapping[str, str]) -> None:
    """Makes an environment that of this process and of its children, in place of the one it had."""
    os.environ.clear()
    os.environ.update(environment)


def _is_same_database(one: SecretStr | None, other: SecretStr | None) -> bool:
    if one is None or other is None:
        return False
    first, second = (urlsplit(url.get_secret_value()) for url in (one, other))
    return (first.hostname, first.port, first.path, first.query) == (
        *(second.hostname, second.port, second.path, second.query),
    )


def _is_service_link(name: str, value: str) -> bool:
    """Whether the variable describes a neighbouring service, though its name looks like ours."""
    is_link = LINK_NAME.search(name) or (name.endswith("_PORT") and LINK_ADDRESS.fullmatch(value))
    return bool(is_link) and name.startswith(LINKED)


def _build_no_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """NO_PROXY in both spellings, with loopback added: a proxy cannot reach our local services."""
    said = ",".join(environment.get(name, "") for name in ("NO_PROXY", "no_proxy")).split(",")
    hosts = dict.fromkeys(host.strip() for host in [*said, *LOOPBACK] if host.strip())
    text = "*" if "*" in hosts else ",".join(hosts)
    return {"NO_PROXY": text, "no_proxy": text}


def _read_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The contents of the files that `<NAME>_FILE` names, for every secret `<NAME>`."""
    secrets = {}
    for name in SECRETS:
        path = environment.get(f"{name}_FILE")
        if not path:
            continue
        if environment.get(name):
            raise SettingsError(f"{name} and {name}_FILE exclude each other: unset one of them")
        try:
            secret = Path(path).read_text().strip()
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{name}_FILE names {path}, which cannot be read ({type(error).__name__})"
            ) from None
        if secret:
            secrets[name] = secret
        elif name.endswith("_URL"):  # otherwise our own database would replace the one meant
            raise SettingsError(f"{name}_FILE names {path}, which is empty")
    return secrets


def _suggest(name: str, known: Iterable[str]) -> str:
    similar = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {similar[0]}?" if similar else ""


def _explain(problem: Any, rename: Callable[[str], str]) -> str:
    first, *rest = map(str, problem["loc"])
    if first in Settings.model_fields:  # a default
        first = str(Settings.model_fields[first].alias)
    message = problem["msg"].removeprefix("Value error, ")
    return f"{'.'.join([rename(first), *rest])}: {message[0].lower()}{message[1:]}"
