"""What Dagster's UI can show without a click: pictures, colours, tables and links as metadata.

The UI shows Markdown of less than 1,000 characters at once; for longer ones it shows a link.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from imagepipeline.models import ImageMetadata

MAX_COLORS = 12  # so that their Markdown stays short
SWATCH = '<path fill="{color}" d="M{left} 1h32v24h-32z"/>'
SWATCHES = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="26">'
    '<path fill="#999" d="M0 0h{width}v26H0z"/>{swatches}</svg>'
)


def show_picture(data_uri: str | None) -> dg.MetadataValue | None:
    """A picture; the UI shows it at once if it is a thumbnail or a placeholder."""
    return dg.MetadataValue.md(f"![picture]({data_uri})") if data_uri else None


def show_colors(colors: Sequence[str]) -> dg.MetadataValue:
    """Swatches of colours (#rrggbb), and their values."""
    shown = colors[:MAX_COLORS]
    swatches = "".join(
        SWATCH.format(color=color, left=1 + 33 * position) for position, color in enumerate(shown)
    )
    svg = SWATCHES.format(width=1 + 33 * len(shown), swatches=swatches)
    uri = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    return dg.MetadataValue.md(f"![swatches]({uri}) {' '.join(shown)}")


def describe_metadata(described: ImageMetadata) -> dict[str, dg.MetadataValue | str]:
    """What a model said of an image."""
    shown: dict[str, dg.MetadataValue | str] = {
        "description": dg.MetadataValue.text(described.description),
        "tags": dg.MetadataValue.text(", ".join(described.tags)),
        "category": described.category,
        "dominant_colors": show_colors(described.dominant_colors),
        "mood": described.mood,
    }
    records = [
        dg.TableRecord(
            {
                "language": tag,
                **one.model_dump(exclude={"tags"}),
                "tags": ", ".join(one.tags),
            }
        )
        for tag, one in described.languages.items()
    ]
    return shown | ({"languages": dg.MetadataValue.table(records=records)} if records else {})


def tabulate(
    variants: Sequence[Mapping[str, Any]], original_bytes: int | None
) -> dg.MetadataValue | None:
    """The variants with their sizes, and how much smaller than the original each is; or None."""
    records = [
        dg.TableRecord(
            {
                "path": variant["path"],
                "width_px": variant["width"],
                "height_px": variant["height"],
                "bytes": variant["size"],
                "saved_percent": round(100 - 100 * variant["size"] / original_bytes),
            }
        )
        for variant in variants
        if original_bytes
    ]
    return dg.MetadataValue.table(records=records) if records else None


def link_to(asset: str, image_id: str) -> dg.MetadataValue:
    """The page of an image's partition of an asset, on the webserver that shows the link."""
    return dg.MetadataValue.url(f"/assets/{asset}?view=partitions&partition={image_id}")
