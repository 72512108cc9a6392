"""Web pages that stand alone: a sample with its pictures, as one file that loads nothing."""

import base64
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from imagepipeline.models import ImageMetadata, Wording
from imagepipeline.sampling import Picture, Sample, Trial
from imagepipeline.text import make_printable

# The texts are escaped; should one slip through, the policy still forbids scripts and requests.
HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>A sample of the plan</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
 color: #222; background: #fff }
section { display: grid; grid-template-columns: 20rem 1fr; gap: 1.5rem; padding: 1.5rem 0;
 border-top: 1px solid #ddd }
h2 { grid-column: 1 / -1; font-size: 1.1rem; margin: 0; overflow-wrap: anywhere }
img { max-width: 100%; display: block }
table { border-collapse: collapse; width: 100%; table-layout: fixed; align-self: start }
th, td { text-align: left; vertical-align: top; padding: .3rem .5rem;
 border-bottom: 1px solid #eee; overflow-wrap: anywhere }
th:first-child { width: 7rem }
tbody th { font-weight: 600; color: #555 }
.changed td:last-child { background: #fff7d6 }
.color { display: inline-block; width: 1em; height: 1em; vertical-align: -.15em;
 border: 1px solid #ccc }
.error { color: #b00020 }
figure { margin: 0 } figcaption { color: #555; font-size: .85rem }
.pair { grid-column: 1 / -1; display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
@media (max-width: 50rem) { section { grid-template-columns: 1fr } }
</style>
"""


@dataclass(frozen=True)
class Row:
    """One line of a comparison: what an image has now, and what it would get."""

    name: str
    now: str
    new: str


def compare(trial: Trial) -> list[Row]:
    """What an image has beside what it would get; variants that stay the same are left out."""
    rows = [Row("cause", "", ", ".join(f"{asset}: {why}" for asset, why in trial.causes.items()))]
    if "metadata" in trial.causes:
        rows += _compare_metadata(*trial.described)
    rows += [
        Row(_name_picture(now or new), _measure(now), _measure(new))
        for now, new in _pair(*trial.pictures)
        if not (now and new and now.content == new.content)
    ]
    cost = "unknown" if trial.cost_usd is None else _format_usd(trial.cost_usd)
    return [*rows, Row("cost", "", cost)]


def explain_costs(sample: Sample) -> str:
    """What the sample costs and what all of the plan would, in a sentence or two."""
    if not sample.trials:
        return "Nothing is planned."
    count = f"{len(sample.trials)} of {sample.planned:,} planned images"
    if sample.cost_usd is None or sample.projected_usd is None:
        return f"{count}; what they cost is not known: set IMAGEPIPELINE_PRICES"
    earlier_usd = round(sample.cost_usd - sample.paid_usd, 6)
    earlier = f", of which {_format_usd(earlier_usd)} were paid before" if earlier_usd else ""
    return (
        f"{count} cost {_format_usd(sample.cost_usd)}{earlier}; "
        f"at this rate all of them cost {_format_usd(sample.projected_usd)}"
    )


def _format_usd(cost_usd: float) -> str:
    return f"{cost_usd:,.2f} USD" if cost_usd >= 10 else f"{cost_usd:.6f} USD"


def build_sample_page(sample: Sample) -> str:
    """A page with all pictures and texts of a sample."""
    sections = [_build_section(trial) for trial in sample.trials]
    return f"{HEAD}<h1>A sample of the plan</h1>\n<p>{_escape(explain_costs(sample))}</p>\n" + (
        "\n".join(sections)
    )


def _compare_metadata(now: ImageMetadata | None, new: ImageMetadata | None) -> list[Row]:
    names = ("description", "tags", "category", "mood", "dominant_colors")
    rows = [Row(name.replace("_", " "), _read(now, name), _read(new, name)) for name in names]
    one, other = (metadata.languages if metadata else {} for metadata in (now, new))
    return rows + [
        Row(f"{label} ({tag})", _read(one.get(tag), name), _read(other.get(tag), name))
        for tag in {**other, **one}
        for name, label in (("description", "description"), ("alt_text", "alt text"))
    ]


def _read(metadata: ImageMetadata | Wording | None, name: str) -> str:
    value = getattr(metadata, name, "")
    return value if isinstance(value, str) else ", ".join(value)


def _pair(
    now: Sequence[Picture], new: Sequence[Picture]
) -> Iterator[tuple[Picture | None, Picture | None]]:
    """Pairs the variants of the same name, in the order of the new ones; then the old ones left."""
    known = {picture.name: picture for picture in now}
    pairs = [(known.pop(picture.name, None), picture) for picture in new]
    return iter([*pairs, *zip_longest(known.values(), [])])


def _name_picture(picture: Picture | None) -> str:
    return picture.name.rpartition("-")[2] if picture else ""


def _measure(picture: Picture | None) -> str:
    if picture is None:
        return ""
    similarity = "" if picture.similarity is None else f", similarity {picture.similarity:.4f}"
    return f"{len(picture.content):,} bytes{similarity}"


def _build_section(trial: Trial) -> str:
    rows = "\n".join(
        f"<tr{' class=changed' if row.now and row.now != row.new else ''}>"
        f"<th>{_escape(row.name)}</th><td>{_show(row, row.now)}</td><td>{_show(row, row.new)}</td>"
        "</tr>"
        for row in compare(trial)
    )
    error = f'<p class="error">{_escape(trial.error)}</p>' if trial.error else ""
    return (
        f"<section><h2>{_escape(trial.image_id)}</h2>\n"
        f"<div>{_embed(trial.thumbnail)}{error}</div>\n"
        f"<table><thead><tr><th></th><th>now</th><th>new</th></tr></thead>\n"
        f"<tbody>{rows}</tbody></table>\n{_build_pictures(trial)}</section>"
    )


def _build_pictures(trial: Trial) -> str:
    """The largest variant before and after, of those that are made anew and differ."""
    pairs = [(now, new) for now, new in _pair(*trial.pictures) if now and new]
    changed = [(now, new) for now, new in pairs if now.content != new.content]
    if not changed:
        return ""
    largest = max(changed, key=lambda pair: len(pair[1].content))
    figures = [
        f"<figure>{_embed(picture.content)}<figcaption>{when}: {_escape(_name_picture(picture))}, "
        f"{_escape(_measure(picture))}</figcaption></figure>"
        for when, picture in zip(("now", "new"), largest, strict=True)
    ]
    return f'<div class="pair">{"".join(figures)}</div>'


def _show(row: Row, text: str) -> str:
    if row.name != "dominant colors":
        return _escape(text)
    colors = [color for color in text.split(", ") if color]
    return " ".join(
        f'<span class="color" style="background: {_escape(color)}"></span> {_escape(color)}'
        for color in colors
    )


def _embed(content: bytes) -> str:
    if not content:
        return ""
    # AVIF has `ftyp` where WebP has its size.
    media_type = "avif" if content[4:8] == b"ftyp" else "webp"
    return f'<img alt="" src="data:image/{media_type};base64,{base64.b64encode(content).decode()}">'


def _escape(text: str) -> str:
    return html.escape(make_printable(text))
