"""Output of the commands: progress on stderr; tables, addresses or JSON on stdout."""

import io
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from imagepipeline.doctor import Finding
from imagepipeline.index import open_index
from imagepipeline.models import Neighbour, Status
from imagepipeline.planning import Applied
from imagepipeline.settings import Settings
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.text import make_printable, to_json

if TYPE_CHECKING:  # they decode images
    from imagepipeline.batch_calls import Fetched
    from imagepipeline.sampling import Sample, Trial

POLL_SECONDS = 0.3
COLOR = re.compile(r"#[0-9a-f]{6}\b")
STYLES = {
    Status.COMPLETED: "green",
    Status.FAILED: "red",
    Status.PROCESSING: "yellow",
    Status.PENDING: "dim",
}
out = Console()


class TolerantStream(io.TextIOBase):
    """A standard stream (`stdout`, `stderr`) that discards output once it can no longer be written.

    This happens when the reader of a pipe is gone, the terminal is closed or the disk is full.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def _stream(self) -> TextIO:
        stream: TextIO = getattr(sys, self._name)
        return stream

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


def follow(
    catalogue: Catalogue, awaited: Mapping[str, int], pause: Callable[[float], None]
) -> None:
    """Shows progress until all images have ended.

    `awaited` maps each image ID to a number of pushes: the image counts as ended only if its run
    began after that push.
    """
    waiting = dict(awaited)
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=err) as progress:
        bar = progress.add_task("waiting", total=len(awaited))
        while waiting:
            states = catalogue.get_states(list(waiting))
            for image_id, state in states.items():
                if state.status.has_ended and state.pushes_seen >= waiting[image_id]:
                    del waiting[image_id]
                    style = STYLES[state.status]
                    progress.console.print(
                        Text.assemble((f"{state.status:<10}", style), " ", make_printable(image_id))
                    )
            current = Counter(
                state.status for image_id, state in states.items() if image_id in waiting
            )
            counts = ", ".join(f"{count} {status}" for status, count in sorted(current.items()))
            progress.update(
                bar, completed=len(awaited) - len(waiting), description=counts or "waiting"
            )
            if waiting:
                pause(POLL_SECONDS)


def follow_apply(steps: Iterable[Applied], total: int) -> Iterator[Applied]:
    """Passes on the progress of an apply, and shows it on stderr with times and cost."""
    bar = Progress(
        TextColumn("applying"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[spent]}"),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task("applying", total=total, spent="")
        for step in steps:
            done = step.completed + step.failed
            bar.update(task, completed=done, spent=f"{step.spent_usd:.4f} USD")
            yield step


def follow_batches(steps: Iterable["Fetched"]) -> Iterator["Fetched"]:
    """Passes on the progress of batches, and shows it on stderr."""
    bar = Progress(
        TextColumn("fetching"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[open]} open batches; Ctrl-C leaves them open"),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task("fetching", total=None, open=0)
        for step in steps:
            bar.update(task, total=step.requests, completed=step.done, open=step.open)
            yield step


def collect_results(catalogue: Catalogue, image_ids: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the status, error, tags, description, and bytes before and after, for each image."""
    rows = []
    for image_id in image_ids:
        row = catalogue.get(image_id) or {"status": "unknown", "variants": []}
        described = row.get("metadata") or {}
        rows.append(
            {
                "image_id": image_id,
                "status": row["status"],
                "error": row.get("error"),
                "tags": described.get("tags", []),
                "description": described.get("description"),
                "bytes_in": row.get("original_bytes"),
                "bytes_out": sum(variant["size"] for variant in row["variants"]),
            }
        )
    return rows


def add_nearest(rows: Sequence[dict[str, Any]], settings: Settings, version: str) -> None:
    """Adds to each row the `nearest` other image among those embedded by this version."""
    index = open_index(settings.index_uri)
    for row in rows:
        neighbour = index.nearest_other(row["image_id"], version)
        row["nearest"] = (
            {"image_id": neighbour.image_id, "score": round(neighbour.score, 4)}
            if neighbour
            else None
        )


def show_results(rows: Sequence[Mapping[str, Any]], seconds: float, as_json: bool) -> None:
    """Prints the results and the total time they took."""
    if as_json:
        print(to_json({"images": list(rows), "seconds": round(seconds, 1)}), flush=True)
        return
    has_nearest = "nearest" in rows[0]
    table = Table(show_lines=True)
    table.add_column("image", overflow="fold", ratio=3)
    table.add_column("status", no_wrap=True)
    table.add_column("tags", ratio=3)
    table.add_column("description", ratio=5)
    table.add_column("bytes before → after", justify="right", ratio=2)
    if has_nearest:
        table.add_column("nearest other image", overflow="fold", ratio=3)
    for row in rows:
        cells: list[Text | str] = [
            _to_text(row["image_id"]),
            Text(make_printable(row["status"]), style=STYLES.get(row["status"], "dim")),
            _to_text(", ".join(map(str, row["tags"]))),
            _to_text(row["error"] or row["description"]),
            f"{row['bytes_in'] or 0:,} → {row['bytes_out']:,}",
        ]
        if has_nearest:
            nearest = row["nearest"]
            cells.append(
                _to_text(f"{nearest['image_id']} ({nearest['score']:.2f})" if nearest else None)
            )
        table.add_row(*cells)
    out.print(table)
    completed = sum(row["status"] == Status.COMPLETED for row in rows)
    rate = f"{len(rows) / seconds * 60:.0f} images per minute"
    out.print(f"{completed} of {len(rows)} completed in {seconds:.1f} s ({rate})", highlight=False)


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


def show_status(read: Callable[[], Mapping[str, Any]], as_json: bool, is_watching: bool) -> None:
    """Prints what `read` returns, once or every second."""
    if as_json:
        while True:
            print(to_json(read(), default=_to_json), flush=True)
            if not is_watching:
                return
            time.sleep(1)
    if not is_watching or not out.is_terminal:
        while True:
            out.print(_tabulate(read()))
            if not is_watching:
                return
            time.sleep(1)
    with Live(_tabulate(read()), console=out, auto_refresh=False) as live:
        while True:
            time.sleep(1)
            live.update(_tabulate(read()), refresh=True)


def show_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """Prints the chosen columns of some rows."""
    chosen = [{name: row.get(name) for name in columns} for row in rows]
    if as_json:
        print(to_json(chosen, default=_to_json))
        return
    if not chosen:
        out.print("None.")
        return
    table = Table()
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in chosen:
        table.add_row(*(_to_text(value) for value in row.values()))
    out.print(table)


def show_sample(sample: "Sample", as_json: bool) -> None:
    """Prints what a sample makes of images beside what they have, and what it costs."""
    from imagepipeline.pages import compare, explain_costs

    costs = {
        "planned": sample.planned,
        "cost_usd": _round_usd(sample.cost_usd),
        "paid_usd": _round_usd(sample.paid_usd),
        "projected_usd": _round_usd(sample.projected_usd),
    }
    if as_json:
        print(to_json({"images": [_describe_trial(trial) for trial in sample.trials], **costs}))
        return
    for trial in sample.trials:
        table = Table(title=_to_text(trial.image_id), title_justify="left", show_lines=True)
        table.add_column("")
        table.add_column("now", overflow="fold", ratio=1)
        table.add_column("new", overflow="fold", ratio=1)
        for row in compare(trial):
            table.add_row(row.name, _mark(row.now), _mark(row.new))
        if trial.error:
            table.add_row("error", "", Text(make_printable(trial.error), style="red"))
        out.print(table)
    out.print(Text(explain_costs(sample)), soft_wrap=True)


def _mark(text: str) -> Text:
    """A text in which each colour is shown as itself."""
    shown = _to_text(text)
    for match in COLOR.finditer(shown.plain):
        shown.stylize(f"black on {match[0]}", *match.span())
    return shown


def _describe_trial(trial: "Trial") -> dict[str, Any]:
    metadata = [one and one.model_dump(by_alias=True) for one in trial.described]
    variants = [
        [
            {
                "path": picture.name,
                "bytes": len(picture.content),
                "similarity": picture.similarity,
            }
            for picture in pictures
        ]
        for pictures in trial.pictures
    ]
    return {
        "image_id": trial.image_id,
        "causes": trial.causes,
        "now": {"metadata": metadata[0], "variants": variants[0]},
        "new": {"metadata": metadata[1], "variants": variants[1]},
        "cost_usd": _round_usd(trial.cost_usd),
        "error": trial.error or None,
    }


def _round_usd(cost_usd: float | None) -> float | None:
    return None if cost_usd is None else round(cost_usd, 6)


def show_findings(findings: Iterable[Finding], as_json: bool) -> bool:
    """Prints the doctor's findings as they come in; returns whether there is any problem."""
    has_problem = False
    for finding in findings:
        has_problem = has_problem or not finding.is_well
        if as_json:
            print(to_json(asdict(finding)), flush=True)
            continue
        mark = ("✓", "green") if finding.is_well else ("✗", "red")
        out.print(
            Text.assemble(mark, make_printable(f" {finding.name:<16} {finding.sentence}")),
            soft_wrap=True,
        )
        if finding.advice:
            out.print(
                Text(make_printable(f"  {'':<16} → {finding.advice}"), style="yellow"),
                soft_wrap=True,
            )
    return has_problem


def show_neighbours(catalogue: Catalogue, neighbours: Sequence[Neighbour], as_json: bool) -> None:
    """Prints search results, best first."""
    rows = []
    for neighbour in neighbours:
        described = (catalogue.get(neighbour.image_id) or {}).get("metadata") or {}
        description = described.get("description", neighbour.text)
        rows.append(
            {
                "image_id": neighbour.image_id,
                "score": round(neighbour.score, 4),
                "description": description,
            }
        )
    if as_json:
        print(to_json(rows))
        return
    if not rows:
        out.print("This model has not embedded any image yet.")
        return
    table = Table("score", "image", "description")
    for row in rows:
        table.add_row(*map(_to_text, (f"{row['score']:.2f}", row["image_id"], row["description"])))
    out.print(table)


def _tabulate(values: Mapping[str, Any]) -> Table:
    table = Table(show_header=False)
    for name, value in values.items():
        table.add_row(name, _to_text(value))
    return table


def _to_text(value: Any) -> Text:
    """Returns a value as text that contains no markup and cannot control the terminal."""
    if isinstance(value, datetime):
        return Text(value.isoformat(timespec="seconds"))
    if isinstance(value, dict | list):
        return Text(to_json(value, indent=1, default=_to_json))
    return Text("" if value is None else make_printable(str(value)))


def _to_json(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")
