"""Commands that start, stop and check the stack."""

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from imagepipeline import uploading
from imagepipeline.commands.images import exit_by, photo_type, push_and_follow
from imagepipeline.commands.shared import (
    EPILOG,
    EXIT_FAILED,
    dry_run_option,
    json_option,
    say,
    with_settings,
)
from imagepipeline.errors import StackError
from imagepipeline.settings import Settings
from imagepipeline.text import to_json


@click.command(epilog=EPILOG)
@click.argument("photos", nargs=-1, type=photo_type)
@click.option(
    "--exit",
    "exits",
    is_flag=True,
    help="Stop the stack after the table instead of waiting for Ctrl-C.",
)
@json_option
@with_settings
def demo(settings: Settings, photos: Sequence[Path], exits: bool, as_json: bool) -> None:
    """Start the stack, process PHOTOS and show the results.

    Without PHOTOS it processes five small ones that come with the package.
    """
    from importlib.resources import files

    from imagepipeline import console, display
    from imagepipeline.providers import build_embedder
    from imagepipeline.runtime.supervisor import Stack

    photos = photos or sorted(Path(str(files("imagepipeline") / "demo_photos")).glob("*.jpg"))
    with Stack(settings, console.report) as stack:
        images = {uploading.build_image_id(photo): photo for photo in photos}
        began = time.monotonic()
        rows = push_and_follow(settings, images, 0, pause=stack.wait)
        display.add_nearest(rows, settings, build_embedder(settings).recipe.version)
        display.show_results(rows, time.monotonic() - began, as_json)
        if not exits:
            display.show_link(stack.webserver_url, rows, as_json)
            console.show_addresses(settings, stack.webserver_url, as_json)
            with contextlib.suppress(KeyboardInterrupt):
                stack.wait()
    exit_by(rows)


@click.command(epilog=EPILOG)
@click.option(
    "--dev", is_flag=True, help="Restart the code server whenever the package's code changes."
)
@json_option
@with_settings
def up(settings: Settings, dev: bool, as_json: bool) -> None:
    """Run the local stack until Ctrl-C or `imagepipeline down`; running uploads finish first."""
    from imagepipeline import console
    from imagepipeline.advice import explain_languages, explain_unpriced_models
    from imagepipeline.runtime.supervisor import Stack

    with Stack(settings, console.report, reloads_code=dev) as stack:
        if problem := explain_unpriced_models(settings):
            console.report(f"Paid work is paused: {problem}")
        if problem := explain_languages(settings):
            console.report(f"Languages: {problem}")
        console.show_addresses(settings, stack.webserver_url, as_json)
        with contextlib.suppress(KeyboardInterrupt):
            stack.wait()


@click.command(epilog=EPILOG)
@json_option
@with_settings
def down(settings: Settings, as_json: bool) -> None:
    """Stop the local stack of this home; running uploads finish first."""
    from imagepipeline.runtime import supervisor

    state = supervisor.find_running(settings)
    if state is not None:
        supervisor.stop_running(settings, state["pid"])
    text = "stopped" if state is not None else f"no stack uses {settings.home}"
    say(to_json({"was_running": state is not None}) if as_json else text)


@click.command(epilog=EPILOG)
@json_option
def doctor(as_json: bool) -> None:
    """Check everything the pipeline depends on, and say how to fix what is wrong.

    It asks each remote provider one tiny question, which may cost money. The exit code is 1 if
    anything is wrong.
    """
    from imagepipeline import display
    from imagepipeline.doctor import examine

    sys.exit(EXIT_FAILED if display.show_findings(examine(Settings.load()), as_json) else 0)


@click.command("settings", epilog=EPILOG)
@json_option
def show_settings(as_json: bool) -> None:
    """Show each setting, and whether it comes from a file, the environment or is the default.

    Secrets are masked. A name without IMAGEPIPELINE_ is for imagepipeline.toml.
    """
    settings = Settings.load()
    stated = list(settings.state())
    if as_json:
        file = str(settings.config) if settings.config else None
        say(to_json({"file": file, "settings": [asdict(one) for one in stated]}))
        return
    say(f"settings file: {settings.config or 'none'}")
    for one in stated:
        value = "unset" if one.value is None else to_json(one.value, ensure_ascii=False)
        say(f"{one.key or one.variable:28} {one.source:12} {value}")


@click.command(epilog=EPILOG)
@click.option(
    "--take-over",
    "is_taken_over",
    is_flag=True,
    help="Take over the catalogue of another Dagster instance.",
)
@dry_run_option
@json_option
@with_settings
def migrate(settings: Settings, is_taken_over: bool, dry_run: bool, as_json: bool) -> None:
    """Create or update the tables of the catalogue and of Dagster; `up` does so by itself.

    Run it before you start the services of a new version. If it runs elsewhere, it waits. A
    catalogue belongs to one Dagster instance: take it over only if the other one is gone for good,
    for example after its database was lost.
    """
    from imagepipeline.runtime import services

    databases = {
        "catalogue": "Postgres" if settings.explicit_database_url else "SQLite",
        "dagster": "Postgres" if settings.dagster_database_url else "SQLite",
    }
    if not dry_run:
        services.migrate(settings, is_taken_over)
    done = "would be brought" if dry_run else "are"
    lines = [f"{name}: the tables on {kind} {done} up to date" for name, kind in databases.items()]
    say(*([to_json({"databases": databases, "dry_run": dry_run})] if as_json else lines))


@click.command(epilog=EPILOG)
@click.argument("name", type=click.Choice(["code-server", "worker", "daemon", "webserver"]))
@click.option(
    "--check",
    is_flag=True,
    help="Only check: exit with 0 if the service is healthy, with 4 if not.",
)
@json_option
@with_settings
def service(settings: Settings, name: str, check: bool, as_json: bool) -> None:
    """Run one service of the stack, for example in a container; `up` runs them all.

    Run `imagepipeline migrate` first, then the code server, one daemon, and any number of workers
    and webservers.
    """
    from imagepipeline.runtime import processes, services

    if not check:
        services.prepare(settings)
        if name in ("code-server", "worker"):
            services.check_redis(settings)
            services.check_catalogue(settings)
        command = services.build_command(settings, name)
        environment = services.build_environment(settings, name)
        processes.reset_signals()
        os.execve(command[0], command, environment)  # noqa: S606  (our own command)
    if not services.is_healthy(settings, name):
        raise StackError(f"{name} does not answer")
    say(to_json({"service": name, "is_healthy": True}) if as_json else f"{name} is healthy")
