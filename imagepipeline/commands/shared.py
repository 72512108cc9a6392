"""What all commands share: options, exit codes, and how they print."""

import functools
from collections.abc import Callable
from typing import Any

import click

from imagepipeline.errors import InvalidUploadError
from imagepipeline.homes import secure_home
from imagepipeline.models import check_tenant
from imagepipeline.settings import Settings
from imagepipeline.text import make_printable

EXIT_FAILED, EXIT_SETTINGS, EXIT_STACK, EXIT_INTERRUPTED = 1, 3, 4, 130
MAX_LISTED = 1000  # rows
EPILOG = """\b
Exit codes: 0 all went well; 1 an image failed or is unknown; 2 wrong usage;
3 a setting is malformed; 4 the stack cannot be started or reached; 130 interrupted."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say what would be done, but change nothing."
)


def _check_tenant(_: click.Context, __: click.Parameter, value: str) -> str:
    try:
        return check_tenant(value)
    except InvalidUploadError as error:
        raise click.BadParameter(str(error)) from None


tenant_option = click.option(
    "--tenant",
    default="",
    callback=_check_tenant,
    help="Whose images they are, if customers share the stack.",
)


def to_text(argument: str) -> str:
    """An argument as text that can be stored; bytes that are not UTF-8 become question marks."""
    return argument.encode(errors="replace").decode()


def say(*lines: str, err: bool = False, nl: bool = True) -> None:
    """Prints lines of any origin; unprintable characters become spaces."""
    click.echo("\n".join(map(make_printable, lines)), nl=nl, err=err)


def note(problem: str) -> None:
    """Prints a problem that does not stop the command to stderr."""
    say(f"Note: {problem}", err=True)


def with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Passes the settings to a command as its first argument, and makes the home private."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        settings = Settings.load()
        secure_home(settings)
        return command(settings, *args, **kwargs)

    return wrapper
