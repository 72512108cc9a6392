"""A compromised decoder: it tells the one lie whose name is appended to the original."""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from imagepipeline.imaging import operations
from imagepipeline.imaging.decoding import Decoded, Rules
from imagepipeline.imaging.decoding import decode as decode_honestly
from imagepipeline.imaging.inspection import Inspection
from imagepipeline.imaging.preparation import Prepared
from imagepipeline.imaging.preparation import prepare as prepare_honestly
from imagepipeline.imaging.variants import render_and_inspect as render_honestly
from imagepipeline.models import Variant, VariantSpec

warm_up = operations.warm_up
told: list[str] = []


def nest(depth: int) -> object:
    """Returns nested lists."""
    return [nest(depth - 1)] if depth else []


ABOUT_THE_IMAGE: dict[str, Callable[[Prepared], Prepared]] = {
    "format": lambda prepared: replace(prepared, format="EXE"),
    "flaw": lambda prepared: replace(prepared, flaw="x" * 5000),
    "placeholder": lambda prepared: replace(
        prepared, placeholder='data:image/webp;base64,AA=="><script>'
    ),
    "preview": lambda prepared: replace(prepared, preview=b"MZ" + prepared.preview),
    "thumbnail": lambda prepared: replace(prepared, thumbnail="x" * 1000),
    "no pixels": lambda prepared: replace(prepared, facts=replace(prepared.facts, width=0)),
    "too many pixels": lambda prepared: replace(
        prepared, facts=replace(prepared.facts, width=10**9)
    ),
    "colour": lambda prepared: replace(
        prepared, facts=replace(prepared.facts, palette=("url(x)",))
    ),
    "name": lambda prepared: replace(
        prepared, facts=replace(prepared.facts, colors=(("](x)", "#000000", 1.0),))
    ),
    "share": lambda prepared: replace(
        prepared, facts=replace(prepared.facts, colors=(("red", "#ff0000", 7.0),))
    ),
    "figure": lambda prepared: replace(prepared, facts=replace(prepared.facts, brightness=1e9)),
    "nesting": lambda prepared: replace(prepared, flaw=cast(str, nest(480))),
    "another size": lambda prepared: replace(prepared, facts=replace(prepared.facts, width=100)),
}
ABOUT_VARIANTS: dict[str, Callable[[list[Variant]], list[Variant]]] = {
    "one too few": lambda variants: variants[:-1],
    "two exchanged": lambda variants: [variants[1], variants[0], *variants[2:]],
    "no picture": lambda variants: [replace(variants[0], content=b"<script>"), *variants[1:]],
    "another format": lambda variants: [
        replace(variants[0], content=variants[1].content),
        *variants[1:],
    ],
    "something behind it": lambda variants: [
        replace(variants[0], content=variants[0].content + b"MZ"),
        *variants[1:],
    ],
    "height": lambda variants: [replace(variants[0], height=7), *variants[1:]],
    "quality": lambda variants: [
        replace(variants[0], spec=replace(variants[0].spec, quality=1)),
        *variants[1:],
    ],
    "path": lambda variants: [
        replace(variants[0], spec=replace(variants[0].spec, name="/../x")),
        *variants[1:],
    ],
}


ABOUT_INSPECTIONS: dict[str, Callable[[Inspection], Inspection]] = {
    "similarity": lambda found: replace(found, similarity=9.0),
    "compared": lambda found: replace(found, similarity=None),
    "width": lambda found: replace(found, width=found.width + 1),
    "attachments": lambda found: replace(found, attachments=("x" * 5000,)),
}


def decode(content: bytes, rules: Rules) -> Decoded:
    content, _, lie = content.rpartition(b"lie:")
    told.append(lie.decode())
    return decode_honestly(content, rules)


def prepare(decoded: Decoded, preview_px: int | None) -> Prepared:
    return ABOUT_THE_IMAGE.get(told[0], lambda prepared: prepared)(
        prepare_honestly(decoded, preview_px)
    )


def render_and_inspect(
    decoded: Decoded, specs: list[VariantSpec], has_rights: bool, compared: list[int]
) -> tuple[list[Variant], list[Inspection]]:
    variants, inspections = render_honestly(decoded, specs, has_rights, compared)
    inspections = [
        ABOUT_INSPECTIONS.get(told[0], lambda found: found)(found) for found in inspections
    ]
    return ABOUT_VARIANTS.get(told[0], lambda variants: variants)(variants), inspections


MAKERS = (decode,)
CALLS = (prepare, render_and_inspect)
