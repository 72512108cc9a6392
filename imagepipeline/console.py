"""What a long-running command prints: what it does on stderr, addresses on stdout.

It goes on if nobody can read that any more.
"""

import io
import os
import sys
from typing import IO, TextIO, cast

from rich.console import Console
from rich.text import Text

from imagepipeline.settings import Settings
from imagepipeline.text import make_printable, to_json


class TolerantStream(io.TextIOBase):
    """A standard stream (`stdout`, `stderr`) that discards output once it can no longer be written.

    This happens when the reader of a pipe is gone, the terminal is closed or the disk is full.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def _stream(self) -> TextIO:
        # While a progress bar is shown, rich puts a proxy here that prints to the bar's console:
        # to us, when the console is ours.
        stream: TextIO = getattr(sys, self._name)
        return getattr(stream, "rich_proxied_file", stream)

    def write(self, text: str) -> int:
        """Writes and flushes the text; returns its length."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            silence(self._stream)
        return len(text)

    def isatty(self) -> bool:
        """Returns whether the standard stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Returns the file descriptor of the standard stream."""
        return self._stream.fileno()


def silence(stream: TextIO) -> None:
    """Discards everything that is buffered in the stream or printed to it from now on."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


err = Console(file=cast(IO[str], TolerantStream("stderr")))
tolerant_out = Console(file=cast(IO[str], TolerantStream("stdout")))


def report(line: str) -> None:
    """Prints what the stack is doing to stderr; never fails, even if stderr is closed."""
    err.print(Text(make_printable(line), style="dim"))


def show_addresses(settings: Settings, webserver_url: str, as_json: bool) -> None:
    """Prints the addresses of the running stack; never fails, even if stdout is closed."""
    own_redis = str(settings.socket_folder / "valkey.sock") if settings.has_own_redis else None
    addresses = {
        "webserver_url": webserver_url,
        "redis": own_redis or "as set by REDIS_URL or REDIS_HOST",
        "storage": settings.storage,
        "logs": str(settings.home / "logs"),
        "dagster_home": str(settings.home / "dagster"),
    }
    if as_json:
        tolerant_out.out(to_json(addresses), highlight=False)
        return
    for name, address in addresses.items():
        tolerant_out.print(
            Text(make_printable(f"{name.replace('_', ' '):<14} {address}")), soft_wrap=True
        )
    tolerant_out.print("Ctrl-C stops the stack after its current uploads.", style="dim")
