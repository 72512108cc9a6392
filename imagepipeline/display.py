"""Output of the commands: progress on stderr; tables, addresses or JSON on stdout.

Tables have no lines and fit 80 columns. Where stdout is not a terminal, each row is one line of any
length, for `grep` and `awk`.
"""

import contextlib
import io
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from imagepipeline import console, overview
from imagepipeline.doctor import Finding
from imagepipeline.index import open_index
from imagepipeline.models import Neighbour, Status
from imagepipeline.overview import count_bytes, describe_age, find_largest
from imagepipeline.settings import Settings
from imagepipeline.stores.applies import ApplyProgress
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.text import make_printable, to_json

if TYPE_CHECKING:  # they decode images
    from imagepipeline.batch_calls import Fetched
    from imagepipeline.sampling import Sample, Trial

POLL_SECONDS = 0.3
STILL_SECONDS = 60
STILL_NOTE = f"Nothing has changed for {STILL_SECONDS} s: `imagepipeline doctor` may say why."
COLOR = re.compile(r"#[0-9a-f]{6}\b")
MAX_ID_COLUMNS = 32  # longer IDs may be folded
PIPE_COLUMNS = 10_000
MAX_FINDING_COLUMNS = 16
HEADERS = {
    "updated_at": "changed",
    "accepted_at": "accepted",
    "run_id": "run",
    "made_by": "made by",
}
STYLES = {
    Status.COMPLETED: "green",
    Status.FAILED: "red",
    Status.PROCESSING: "yellow",
    Status.PENDING: "dim",
}
out = Console()


class Patience:
    """Tells a person who waits where to look, once each time that nothing changes for a minute."""

    def __init__(self) -> None:
        self._value: object = None
        self._due_seconds = math.inf

    def look_at(self, value: object) -> None:
        """Notes what is shown now; says on stderr if it has been the same for too long."""
        now_seconds = time.monotonic()
        if value != self._value:
            self._value, self._due_seconds = value, now_seconds + STILL_SECONDS
        elif now_seconds >= self._due_seconds:
            self._due_seconds = math.inf
            console.err.print(STILL_NOTE, soft_wrap=True)


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
    patience = Patience()
    with Progress(*columns, console=console.err) as progress:
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
            patience.look_at(counts)
            if waiting:
                pause(POLL_SECONDS)


def follow_apply(steps: Iterable[ApplyProgress], total: int) -> Iterator[ApplyProgress]:
    """Passes on the progress of an apply, and shows it on stderr with times and cost."""
    bar = Progress(
        TextColumn("applying"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[spent]}"),
        console=console.err,
    )
    patience = Patience()
    with bar:
        task = bar.add_task("applying", total=total, spent="")
        for step in steps:
            done = step.completed + step.failed
            bar.update(task, completed=done, spent=f"{step.spent_usd:.4f} USD")
            patience.look_at(step)
            yield step


@contextlib.contextmanager
def show_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function that shows on stderr what is done, and how many of how many more are."""
    columns = [
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console.err, speed_estimate_period=300) as progress:

        def advance(verb: str, count: int, total: int) -> None:
            if verb not in bars:
                bars[verb] = progress.add_task(verb, total=total, rate=0)
            progress.advance(bars[verb], count)
            [task] = [task for task in progress.tasks if task.id == bars[verb]]
            progress.update(task.id, rate=task.completed / max(task.elapsed or 0, 0.001))

        yield advance


def follow_batches(steps: Iterable["Fetched"]) -> Iterator["Fetched"]:
    """Passes on the progress of batches, and shows it on stderr."""
    bar = Progress(
        TextColumn("fetching"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[open]} open batches; Ctrl-C leaves them open"),
        console=console.err,
    )
    with bar:
        task = bar.add_task("fetching", total=None, open=0)
        for step in steps:
            bar.update(task, total=step.requests, completed=step.done, open=step.open)
            yield step


def collect_results(catalogue: Catalogue, image_ids: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the status, error, tags, description, and bytes before and after, for each image.

    `bytes_out` is the sum of all variants; `largest` is the smallest file of the greatest width.
    """
    rows = []
    for image_id in image_ids:
        row = catalogue.get(image_id) or {"status": "unknown", "variants": []}
        described = row.get("metadata") or {}
        largest = find_largest(row["variants"])
        rows.append(
            {
                "image_id": image_id,
                "status": row["status"],
                "error": row.get("error"),
                "tags": described.get("tags", []),
                "description": described.get("description"),
                "bytes_in": row.get("original_bytes"),
                "bytes_out": sum(one["size"] for one in row["variants"] if not one["is_alias"]),
                "largest": largest
                and {name: largest[name] for name in ("path", "width", "height", "format", "size")},
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
    table = _build_table()
    table.leading = 1
    _add_id_column(table, "image", [row["image_id"] for row in rows])
    table.add_column("original", justify="right", no_wrap=True)
    table.add_column("largest variant", no_wrap=True)
    table.add_column("saved", justify="right", no_wrap=True)
    table.add_column("description", ratio=1)
    for row in rows:
        nearest = row["nearest"] if has_nearest else None
        described = _to_text(row["error"] or row["description"])
        if row["status"] != Status.COMPLETED:
            described = Text.assemble(
                (f"{row['status']} ", STYLES.get(row["status"], "dim")), described
            )
        if nearest:
            found = make_printable(f"nearest: {nearest['image_id']} ({nearest['score']:.2f})")
            described.append("\n").append(found, "dim")
        table.add_row(_to_text(row["image_id"]), *_describe_saving(row), described)
    _print(table)
    completed = sum(row["status"] == Status.COMPLETED for row in rows)
    rate = f"{len(rows) / seconds * 60:.0f} images per minute"
    _say(f"\n{completed} of {len(rows)} completed in {seconds:.1f} s ({rate})")


def _describe_saving(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """The original's size, the largest variant's size and format, and what it saves."""
    original, largest = row["bytes_in"], row["largest"]
    if not original or not largest:
        return (count_bytes(original) if original else "", "", "")
    return (
        count_bytes(original),
        f"{count_bytes(largest['size'])} {largest['format'].upper()}",
        f"{1 - largest['size'] / original:.0%}",
    )


def show_link(webserver_url: str, rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Prints where to look at the first result in the Dagster UI."""
    if not as_json:
        link = overview.locate_image(webserver_url, rows[0]["image_id"])
        console.tolerant_out.print(Text(f"See them in the Dagster UI: {link}\n"), soft_wrap=True)


def show_status(
    read: Callable[[], Mapping[str, Any]],
    describe: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    as_json: bool,
    is_watching: bool,
) -> None:
    """Prints what `read` returns, once or every second: as JSON, or as the lines of `describe`."""
    if as_json:
        while True:
            print(to_json(read(), default=_to_json), flush=True)
            if not is_watching:
                return
            time.sleep(1)
    if not is_watching or not out.is_terminal or out.is_dumb_terminal:
        while True:
            _print(_list_lines(describe(read())))
            if not is_watching:
                return
            time.sleep(1)
            _say("")
    with Live(_list_lines(describe(read())), console=out, auto_refresh=False) as live:
        while True:
            time.sleep(1)
            live.update(_list_lines(describe(read())), refresh=True)


def show_rows(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    as_json: bool,
    shown: Sequence[str] | None = None,
) -> None:
    """Prints the chosen columns of some rows.

    As a table, it prints those that are `shown` and not empty; by default all.
    """
    if as_json:
        print(
            to_json([{name: row.get(name) for name in columns} for row in rows], default=_to_json)
        )
        return
    if not rows:
        out.print("None.")
        return
    table, names = _build_table(), []
    for name in shown or columns:
        values = [row.get(name) for row in rows]
        if shown and all(value is None for value in values):
            continue
        names.append(name)
        header = HEADERS.get(name, name)
        if name in ("id", "image_id", "status", "reason"):
            _add_id_column(table, header, values)
        elif all(isinstance(value, int | float | datetime | None) for value in values):
            table.add_column(header, justify="right", no_wrap=True)
        else:
            table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(_to_cell(row.get(name)) for name in names))
    _print(table)


def stream_json(rows: Iterable[Mapping[str, Any]]) -> None:
    """Prints rows as a JSON list, each as soon as it is known."""
    before = "["
    for row in rows:
        print(before, to_json(row, default=_to_json), sep="")
        before = ","
    print("]" if before == "," else "[]")


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
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=False)
        table.add_column(width=1)
        table.add_column(width=MAX_FINDING_COLUMNS, no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(Text(*mark), finding.name, _to_text(finding.sentence))
        if finding.advice:
            table.add_row("", "", _to_text(f"→ {finding.advice}", "yellow"))
        _print(table)
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
    table = _build_table()
    table.add_column("score")
    _add_id_column(table, "image", [row["image_id"] for row in rows])
    table.add_column("description", overflow="fold")
    for row in rows:
        table.add_row(*map(_to_text, (f"{row['score']:.2f}", row["image_id"], row["description"])))
    _print(table)


def _build_table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")


def _add_id_column(table: Table, name: str, values: Iterable[object]) -> None:
    """Adds a column of IDs, which are not folded unless one is very long."""
    is_short = all(len(str(value)) <= MAX_ID_COLUMNS for value in values)
    table.add_column(name, overflow="fold", no_wrap=is_short)


def _list_lines(values: Mapping[str, Any]) -> Table:
    """Names and values, one under the other."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in values.items():
        style = STYLES.get(value) if name == "status" else None
        if isinstance(value, str) and value.startswith("http://"):
            style = f"link {value}"  # stays whole for a click, also where it is wrapped
        table.add_row(name, _to_text(value, style))
    return table


def _print(table: Table) -> None:
    if out.is_terminal:
        out.print(table)
        return
    wide = Console(file=io.StringIO(), width=PIPE_COLUMNS, color_system=None)
    with wide.capture() as capture:
        wide.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())
    sys.stdout.flush()


def _say(line: str) -> None:
    out.print(Text(line), soft_wrap=True)


def _to_cell(value: Any) -> Text:
    """Returns a value as it stands in a list: a time by how long ago it was."""
    if isinstance(value, datetime):
        return Text(describe_age(value, datetime.now(UTC)))
    return _to_text(value)


def _to_text(value: Any, style: str | None = None) -> Text:
    """Returns a value as text that contains no markup and cannot control the terminal."""
    if isinstance(value, datetime):
        return Text(value.isoformat(timespec="seconds"))
    if isinstance(value, dict | list):
        return Text(to_json(value, indent=1, default=_to_json))
    return Text("" if value is None else make_printable(str(value)), style or "")


def _to_json(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")
