"""Draws docs/images/variants.png: a set of variants of one's own, made of the demo photos.

python -m imagepipeline_tests.end_to_end.contact_sheet
"""

import io
from importlib.resources import files
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from imagepipeline.imaging.decoding import decode
from imagepipeline.imaging.variants import render
from imagepipeline.variant_settings import parse_variants

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "variants.png"
BOX_PX, GAP_PX, LABEL_PX = 200, 16, 40
VARIANTS = [
    {"name": "page", "width": BOX_PX, "height": BOX_PX},
    {"name": "square", "width": BOX_PX, "height": BOX_PX, "fit": "cover"},
    {
        **{"name": "thumb", "width": BOX_PX, "height": BOX_PX},
        **{"fit": "cover", "focus": "attention"},
    },
    {"name": "tall", "width": 100, "height": BOX_PX, "fit": "cover", "focus": "attention"},
    {"name": "banner", "width": BOX_PX, "height": 80, "fit": "cover", "focus": "attention"},
]
PHOTOS = {  # with the focus that an upload could give
    "rocket": (0.5, 0.5),
    "coffee": (0.5, 0.4),
    "cat": (0.42, 0.45),
    "astronaut": (0.8, 0.8),
}


def make_row(photo: Path, focus: tuple[float, float]) -> list[tuple[str, Image.Image]]:
    """Returns the variants of a photo with their labels; the last one follows the focus."""
    decoded = decode(photo.read_bytes())
    specs = parse_variants([{**one, "formats": ["jpeg"]} for one in VARIANTS])
    by_name = {spec.name: spec for spec in specs}
    chosen = [(name, by_name[name]) for name in (str(one["name"]) for one in VARIANTS)]
    chosen.append((f"tall, focus\n{focus[0]:g},{focus[1]:g}", by_name["tall"].at(focus)))
    made = render(decoded, [spec for _, spec in chosen])
    return [
        (name, Image.open(io.BytesIO(one.content)))
        for (name, _), one in zip(chosen, made, strict=True)
    ]


def main() -> None:
    """Draws a row for each photo."""
    folder = Path(str(files("imagepipeline"))) / "demo_photos"
    rows = [make_row(folder / f"{name}.jpg", focus) for name, focus in PHOTOS.items()]
    widths = [max(picture.width for _, picture in column) for column in zip(*rows, strict=True)]
    size = (sum(widths) + GAP_PX * len(widths), len(rows) * (BOX_PX + LABEL_PX))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for row, cells in enumerate(rows):
        for column, (name, picture) in enumerate(cells):
            left = GAP_PX // 2 + sum(widths[:column]) + GAP_PX * column
            top = row * (BOX_PX + LABEL_PX)
            draw.text((left, top + 2), name, "black", font)
            sheet.paste(picture, (left, top + LABEL_PX))
    sheet.quantize(256).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
