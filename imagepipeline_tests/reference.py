"""Writes docs/settings.md, docs/commands.md and the JSON schema of events from the code.

    python -m imagepipeline_tests.reference

`test_docs.py` compares the files with what this module builds.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from imagepipeline.cli import EPILOG, cli
from imagepipeline.events import Event
from imagepipeline.settings import BUCKET_SECRETS, Settings
from imagepipeline.settings_file import CHOICE, name_key

DOCS = Path(__file__).parent.parent / "docs"
SCHEMA = DOCS.parent / "imagepipeline" / "event.schema.json"
JSON_SCHEMA = "https://json-schema.org/draft/2020-12/schema"
COMMAND = "python -m imagepipeline_tests.reference"
NOTE = f"<!-- Written by `{COMMAND}`. Do not edit. -->"
HELP_COLUMNS = 96

SETTINGS_INTRODUCTION = """\
All settings are optional, and all are checked at start. Each is an environment variable; an empty
one counts as unset. A switch is on with `1` and off with `0`.

Settings that are no secrets may instead be in a file, `imagepipeline.toml` in the working
directory, or the file that `IMAGEPIPELINE_CONFIG` names:

```toml
vision_model = "gpt-4o"
max_runs = 10
keep_copyright = true
tags = ["harbour", "night"]

[prices]
"gpt-4o" = [2.5, 10.0]
```

Tables such as `[prices]` come last. Relative folders are beside the file. The environment wins. The
processes that `up` and `service` start get what the file said at that moment: restart the stack
after a change. `imagepipeline settings` shows each value and where it comes from.

An unknown variable that starts with `IMAGEPIPELINE_` is refused, because it is most likely a typo.
Variables that Kubernetes sets for neighbouring services (`REDIS_PORT=tcp://…`,
`IMAGEPIPELINE_PORT=…`) are ignored.

Dagster's own options are in `dagster.yaml`."""

SECRETS_INTRODUCTION = """\
Each of these variables holds a secret, which `imagepipeline.toml` may not. It may be given as a
file of its own instead: set `<NAME>_FILE` to its path, for example `OPENAI_API_KEY_FILE`."""

# A subject, what it is about, and its settings by their names in `Settings`.
GROUPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "Files and folders",
        "Where everything is kept.",
        ("config", "home", "storage_root", "index_root"),
    ),
    (
        "Redis and databases",
        "Without these, the stack runs its own Valkey and uses SQLite.",
        (
            *("explicit_redis_url", "redis_host", "redis_port", "queue_prefix"),
            *("explicit_broker_url", "explicit_database_url", "dagster_database_url"),
        ),
    ),
    (
        "Concurrency",
        "How much happens at the same time.",
        ("max_runs", "worker_slots", "max_run_seconds", "batch_size"),
    ),
    (
        "Variants",
        "What the variants look like and what they keep.",
        (
            "variants",
            "webp_quality",
            "avif_quality",
            "animation",
            "accept_truncated",
            "keep_copyright",
            "compared_share",
        ),
    ),
    (
        "Limits on uploads",
        "An original beyond one of these limits fails as `too_large` or `limits`.",
        (
            *("max_bytes", "max_pixels", "max_side_px", "max_frames", "max_icc_bytes"),
            *("max_text_bytes", "max_memory_bytes", "max_cpu_seconds", "require_confinement"),
        ),
    ),
    (
        "Vision model",
        "Who describes the images; see [paid models](paid-models.md).",
        (
            *("vision", "openai_api_key", "openai_base_url", "vision_model", "vision_prompt"),
            *("vision_long_side_px", "vision_detail", "answer_format"),
            *("languages", "vision_tags", "vision_categories"),
        ),
    ),
    (
        "Embedding model",
        "Who turns descriptions and search texts into vectors.",
        ("embedding", "openrouter_api_key", "openrouter_base_url", "embedding_model"),
    ),
    (
        "Paid calls",
        "How often a provider is asked, and how much it may cost.",
        (
            *("rate_limit", "prices", "daily_budget_usd", "monthly_budget_usd"),
            "allow_plain_http",
        ),
    ),
    (
        "Tenants",
        "What customers who share the stack may use; see "
        "[uploads](uploads.md#share-the-stack-between-customers).",
        ("tenant_max_runs", "tenant_daily_budgets_usd"),
    ),
    (
        "Notices",
        "Who is told of failures and pauses.",
        (
            *("webhook_url", "webhook_secret", "webhook_allow_private"),
            *("smtp_url", "mail_from", "mail_to"),
        ),
    ),
    (
        "Events",
        "What your app is told; see [events](events.md).",
        ("event_stream_length", "event_webhook_url"),
    ),
    (
        "Retention",
        "What is forgotten, and when; rows, history, files and vectors of images stay. See "
        "[scale](scale.md).",
        (
            *("keep_runs_days", "keep_partitions", "keep_partitions_days"),
            *("keep_calls_days", "keep_notices_days"),
        ),
    ),
    (
        "Your own definitions",
        "Assets, checks and sensors of your own; `examples/own_checks.py` adds one.",
        ("definitions",),
    ),
    (
        "Display",
        "The Dagster UI and `imagepipeline list`.",
        ("webserver_port", "webserver_host", "list_completed_hours", "list_failed_hours"),
    ),
)


class UngroupedSettingsError(Exception):
    """A setting is in no group, or a group names a setting that does not exist."""


def main() -> None:
    """Writes the pages."""
    for path, text in build_pages().items():
        path.write_text(text)
        click.echo(path.relative_to(DOCS.parent))


def build_pages() -> dict[Path, str]:
    """The text of each page, by its path."""
    return {
        DOCS / "settings.md": build_settings(),
        DOCS / "commands.md": build_commands(),
        SCHEMA: build_schema(),
    }


def build_schema() -> str:
    """The JSON schema of an event, as apps receive it."""
    schema = Event.model_json_schema(mode="serialization")
    return json.dumps({"$schema": JSON_SCHEMA, **schema}, indent=2) + "\n"


def build_settings() -> str:
    """The page about settings. Settings marked as internal are left out.

    Raises:
        UngroupedSettingsError: GROUPS and `Settings` do not name the same settings.
    """
    public = {
        name: field for name, field in Settings.model_fields.items() if not is_internal(field)
    }
    grouped = {name for _, _, names in GROUPS for name in names}
    if unknown := grouped - Settings.model_fields.keys():
        raise UngroupedSettingsError(f"GROUPS names what is not a setting: {sorted(unknown)}")
    if missing := public.keys() - grouped:
        raise UngroupedSettingsError(
            f"no group has {sorted(missing)}: add them to GROUPS in {__name__}, or mark them in "
            'settings.py with json_schema_extra={"internal": True}'
        )
    parts = [f"{NOTE}\n\n# Settings\n\n{SETTINGS_INTRODUCTION}\n"]
    for title, introduction, names in GROUPS:
        rows = [describe_setting(public[name]) for name in names if name in public]
        if rows:
            head = "| variable | in the file | default | meaning |\n|---|---|---|---|\n"
            parts.append(f"## {title}\n\n{introduction}\n\n{head}" + "\n".join(rows) + "\n")
    secrets = [field.alias for field in public.values() if holds_secret(field)]
    lines = "\n".join(f"- `{name}`" for name in [*secrets, *sorted(BUCKET_SECRETS)])
    parts.append(f"## Secrets\n\n{SECRETS_INTRODUCTION}\n\n{lines}\n")
    return "\n".join(parts)


def is_internal(field: FieldInfo) -> bool:
    """Whether a setting is set by one of our processes for another one, and by no user."""
    return isinstance(field.json_schema_extra, dict) and bool(
        field.json_schema_extra.get("internal")
    )


def holds_secret(field: FieldInfo) -> bool:
    """Whether a setting is a secret, and so can be given as a file."""
    return SecretStr.__name__ in str(field.annotation)


def describe_setting(field: FieldInfo) -> str:
    """A setting as a row of the table."""
    description = str(field.description).replace("|", "\\|")
    is_in_file = not (holds_secret(field) or field.alias == CHOICE)
    key = f"`{name_key(str(field.alias))}`" if is_in_file else ""
    return f"| `{field.alias}` | {key} | {format_default(field.default)} | {description} |"


def format_default(value: Any) -> str:
    """A default as one would write it in the environment; empty for a setting that is unset."""
    if value in (None, (), ""):
        return ""
    if isinstance(value, bool):
        return f"`{int(value)}`"
    if isinstance(value, tuple):
        return f"`{','.join(value)}`"
    return f"`{json.dumps(value)}`" if isinstance(value, dict) else f"`{value}`"


def build_commands() -> str:
    """The page about commands: a table of all, then the help of each."""
    commands = dict(list_commands(cli, "imagepipeline"))
    rows = [
        f"| [`{name}`](#{name.replace(' ', '-')}) | {command.get_short_help_str(200)} |"
        for name, command in commands.items()
    ]
    codes = " ".join(EPILOG.replace("\b", "").split()).removeprefix("Exit codes: ").rstrip(".")
    parts = [
        f"{NOTE}\n\n# Commands\n\n"
        "Each command explains itself with `--help` and prints JSON with `--json`.\n",
        "| command | what it does |\n|---|---|\n" + "\n".join(rows) + "\n",
        "| exit code | meaning |\n|---|---|\n"
        + "\n".join("| {} | {} |".format(*code.split(" ", 1)) for code in codes.split("; "))
        + "\n",
    ]
    parts += [
        f"## {name}\n\n```\n{format_help(name, command)}\n```\n"
        for name, command in commands.items()
    ]
    return "\n".join(parts)


def list_commands(group: click.Group, name: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below a group with its full name, in the order of the code."""
    for command in group.commands.values():
        full_name = f"{name} {command.name}"
        if isinstance(command, click.Group):
            yield from list_commands(command, full_name)
        else:
            yield full_name, command


def format_help(name: str, command: click.Command) -> str:
    """What `--help` prints, without the exit codes, which are the same for all."""
    size = {"terminal_width": HELP_COLUMNS, "max_content_width": HELP_COLUMNS}
    context = click.Context(command, info_name=name, **size)
    formatter = context.make_formatter()
    command.format_usage(context, formatter)
    command.format_help_text(context, formatter)
    command.format_options(context, formatter)
    return "\n".join(line.rstrip() for line in formatter.getvalue().strip().splitlines())


if __name__ == "__main__":
    main()
