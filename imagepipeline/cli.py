"""The command line: its group, its commands, and what errors become.

Commands import what they need when they run, so that `push` starts at once.
"""

import io
import os
import sys

import click

from imagepipeline.commands import (
    control,
    erase,
    events,
    failed,
    images,
    imports,
    paid,
    plans,
    retention,
    stack,
)
from imagepipeline.commands.shared import (
    EPILOG,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_SETTINGS,
    EXIT_STACK,
    say,
)
from imagepipeline.errors import ImagePipelineError, PostponedError, SettingsError, StackError


def main() -> None:
    """Runs the command line; our own errors become one line and an exit code."""
    open_standard_streams()
    try:
        cli(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        silence_streams()
        sys.exit(EXIT_FAILED)  # as click and rich do
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)  # it quotes arguments, which may be file names that others chose
        say(*shown.getvalue().rstrip("\n").split("\n"), err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(EXIT_INTERRUPTED)
    except SettingsError as error:
        say(f"Setting: {error}", err=True)
        sys.exit(EXIT_SETTINGS)
    except (StackError, PostponedError) as error:
        say(*f"Error: {error}".split("\n"), err=True)
        sys.exit(EXIT_STACK)
    except ImagePipelineError as error:
        say(f"Error: {error}", err=True)
        sys.exit(EXIT_FAILED)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        say(f"Error: {error.strerror or type(error).__name__}{where}", err=True)
        sys.exit(EXIT_STACK)


def open_standard_streams() -> None:
    """Opens closed standard streams, so that no file of ours gets their descriptor.

    What their encoding lacks is printed as a question mark.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which is this one
        if getattr(sys, name) is None:
            setattr(
                sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w", closefd=False)
            )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def silence_streams() -> None:
    """Discards buffered output, so that Python does not fail to flush it when it exits."""
    from imagepipeline import console

    for stream in (sys.stdout, sys.stderr):
        console.silence(stream)


@click.group(epilog=EPILOG)
@click.version_option(package_name="imagepipeline")
def cli() -> None:
    """Process uploaded images in the background: metadata, variants and an embedding for each.

    \b
    Try it:                imagepipeline demo
    Run it:                imagepipeline up
    Then, elsewhere:       imagepipeline push PHOTO.jpg --wait
                           imagepipeline search "a boat at sunset"

    All state is in one folder: .imagepipeline, or IMAGEPIPELINE_HOME. Settings are environment
    variables, or in imagepipeline.toml.
    """


for command in (
    stack.demo,
    stack.up,
    stack.down,
    images.push,
    imports.import_images,
    images.status,
    images.list_images,
    images.prioritize,
    control.cancel,
    erase.erase,
    images.sweep,
    failed.failed,
    events.events,
    images.search,
    paid.costs,
    plans.plan,
    plans.apply,
    paid.limit,
    control.pause,
    control.resume,
    stack.show_settings,
    retention.prune,
    retention.restore,
    stack.doctor,
    stack.migrate,
    stack.service,
):
    cli.add_command(command)


if __name__ == "__main__":
    main()
