"""Asset checks: are an image's variants what they should be? Made by the `variants` asset once they are stored."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from imagepipeline.defs.partitions import uploads
from imagepipeline.errors import ImagePipelineError, MissingOriginalError
from imagepipeline.imaging.inspection import Inspection
from imagepipeline.imaging.variants import Renderer
from imagepipeline.models import Claim, VariantSpec
from imagepipeline.originals import Original, Originals
from imagepipeline.storage import Storage
from imagepipeline.stores.catalogue import Catalogue

MIN_SIMILARITY = 0.8
MAX_ATTACHED_BYTES = 1_000_000
# AVIF reaches the look of WebP at some 17 points less; above that it is asked to look better, and may be larger.
AVIF_QUALITY_MARGIN = 15
CHECKS = {
    "complete": "All six variants exist, can be decoded, and have the size and format their rows say.",
    "clean": "Nothing but pixels is in the variants: no EXIF, GPS, XMP, comment or profile.",
    "small": "No variant is larger than the original, no AVIF than its WebP unless its quality asks for that.",
    "similar": f"Each variant looks like the original: a structural similarity of {MIN_SIMILARITY} or more.",
}
ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN
SEVERITIES = {"complete": ERROR, "clean": ERROR, "small": WARN, "similar": WARN}

with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore", dg.PreviewWarning
    )  # partitioned checks; Dagster's version is pinned
    SPECS = [
        dg.AssetCheckSpec(name, asset="variants", description=description, partitions_def=uploads)
        for name, description in CHECKS.items()
    ]


def check_variants(
    claim: Claim, catalogue: Catalogue, files: Storage, originals: Originals, renderer: Renderer
) -> list[dg.AssetCheckResult]:
    """Reads the claimed image's stored variants back and compares them with their rows and their original."""
    problems, facts = find_problems(claim, catalogue, files, originals, renderer)
    return [
        dg.AssetCheckResult(
            check_name=name,
            passed=not problems[name],
            severity=SEVERITIES[name],
            description="; ".join(problems[name])[:1000] or None,
            metadata=facts,
        )
        for name in CHECKS
    ]


def find_problems(
    claim: Claim, catalogue: Catalogue, files: Storage, originals: Originals, renderer: Renderer
) -> tuple[dict[str, list[str]], dict[str, float | int]]:
    """What is wrong with the claimed image's variants, by the names of CHECKS, and figures about them.

    A check that cannot be made has failed, and fails nothing else.
    """
    try:
        variants = (catalogue.get(claim.image_id) or {"variants": []})["variants"]
        original = originals.load(claim, catalogue)
        contents = [_read(files, variant) for variant in variants]
        inspections = renderer.inspect(original.session, contents)
    except ImagePipelineError as error:
        return {name: [str(error)] for name in CHECKS}, {}
    found = [
        {**variant, "found": inspection, "spec": _spec_of(variant, renderer.specs)}
        for variant, inspection in zip(variants, inspections, strict=True)
    ]
    problems = {
        "complete": [*_find_incomplete(found, original, len(renderer.specs))],
        "clean": [
            f"{one['path']}: {', '.join(one['found'].attachments)}"
            for one in found
            if one["found"].attachments
        ],
        "small": [*_find_large(found, original)],
        "similar": [*_find_unlike(found)],
    }
    figures = {
        "variant_count": len(found),
        "bytes_in": original.facts.original_bytes,
        "bytes_out": sum(one["size"] for one in found),
        "min_similarity": round(min((one["found"].similarity for one in found), default=0), 4),
    }
    return problems, figures


def _spec_of(variant: Mapping[str, Any], specs: Sequence[VariantSpec]) -> VariantSpec | None:
    return next(
        (spec for spec in specs if variant["path"].endswith(f"-{spec.suffix}.{spec.format}")), None
    )


def _read(files: Storage, variant: Mapping[str, Any]) -> bytes:
    """The stored bytes, and of what somebody has attached to them since, so many that it is found."""
    try:
        return files.read(variant["path"], variant["size"] + MAX_ATTACHED_BYTES)
    except MissingOriginalError:
        return b""


def _find_incomplete(
    found: Sequence[Mapping[str, Any]], original: Original, spec_count: int
) -> Iterator[str]:
    if len(found) != spec_count:
        yield f"there are {len(found)} variants instead of {spec_count}"
    for variant in found:
        inspection: Inspection = variant["found"]
        spec: VariantSpec | None = variant["spec"]
        made = (inspection.format, inspection.width, inspection.height)
        if inspection.fault:
            yield f"{variant['path']} cannot be decoded: {inspection.fault}"
        elif made != (variant["format"], variant["width"], variant["height"]):
            yield f"{variant['path']} is {made} where its row says otherwise"
        elif spec and inspection.width != min(spec.width_px, original.facts.width):
            yield f"{variant['path']} is {inspection.width} px wide"


def _find_large(found: Iterable[Mapping[str, Any]], original: Original) -> Iterator[str]:
    webp = {
        variant["spec"].width_px: variant
        for variant in found
        if variant["spec"] and variant["format"] == "webp"
    }
    for variant in found:
        size, spec = variant["size"], variant["spec"]
        if size > original.facts.original_bytes:
            yield f"{variant['path']} has {size:,} bytes, the original {original.facts.original_bytes:,}"
        twin = webp.get(spec.width_px) if spec and spec.format == "avif" else None
        if (
            twin
            and spec.quality <= twin["spec"].quality - AVIF_QUALITY_MARGIN
            and size > twin["size"]
        ):
            yield f"{variant['path']} has {size:,} bytes, {twin['path']} {twin['size']:,}"


def _find_unlike(found: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for variant in found:
        inspection: Inspection = variant["found"]
        if not inspection.fault and inspection.similarity < MIN_SIMILARITY:
            yield f"{variant['path']} has a similarity of {inspection.similarity:.3f} to the original"
