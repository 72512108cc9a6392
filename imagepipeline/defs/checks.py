"""Checks of stored variants: of one image in its run, and of the last day's images for Dagster."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import dagster as dg
from pydantic import BaseModel

from imagepipeline.errors import MissingOriginalError, PostponedError, WrongVariantsError
from imagepipeline.imaging.inspection import Inspection
from imagepipeline.imaging.variants import Renderer
from imagepipeline.models import Claim, VariantSpec, now_utc
from imagepipeline.originals import Original
from imagepipeline.storage import Storage
from imagepipeline.stores.catalogue import Catalogue

MIN_SIMILARITY = 0.8
MAX_ATTACHED_BYTES = 1_000_000
# AVIF looks like WebP at a quality 17 points lower. Above that it looks better, and may be larger.
AVIF_QUALITY_MARGIN = 15
CHECKS = {
    "complete": "All variants exist and have the size and format of their rows.",
    "clean": "The variants contain nothing but pixels: no EXIF, GPS, XMP, comment or profile.",
    "small": "No variant is larger than the original, unless its format is lossless, and no AVIF "
    "larger than its WebP, unless its quality asks for that.",
    "similar": "The variants look like the original: a structural similarity of "
    f"{MIN_SIMILARITY} or more. The smallest variant of each format is decoded and compared; of "
    "a sample of images (IMAGEPIPELINE_COMPARED_SHARE), all are.",
}
ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN
SEVERITIES = {"complete": ERROR, "clean": ERROR, "small": WARN, "similar": WARN}

SPECS = [
    dg.AssetCheckSpec(name, asset="variants", description=description)
    for name, description in CHECKS.items()
]
WINDOW = timedelta(days=1)
REPORT_EVERY = timedelta(hours=1)
MAX_PROBLEMS = 100

Problems = dict[str, list[str]]


@dg.multi_asset_check(name="variant_checks", specs=SPECS)
def variant_checks(catalogue: dg.ResourceParam[Catalogue]) -> Iterator[dg.AssetCheckResult]:
    """The checks of all images of the last day; each materialization has its image's own."""
    for evaluation in evaluate(Recent.load(catalogue, now_utc())):
        yield dg.AssetCheckResult(
            passed=evaluation.passed,
            check_name=evaluation.check_name,
            severity=evaluation.severity,
            description=evaluation.description,
            metadata=evaluation.metadata,
        )


@dg.sensor(minimum_interval_seconds=60, default_status=dg.DefaultSensorStatus.RUNNING)
def check_sensor(
    context: dg.SensorEvaluationContext, catalogue: dg.ResourceParam[Catalogue]
) -> dg.SensorResult | dg.SkipReason:
    """Reports the checks of the last day's images: hourly, and whenever the problems change.

    With partitioned checks the lineage page would not load, as it asks for each partition's status.
    """
    now = now_utc()
    try:
        recent = Recent.load(catalogue, now)
    except PostponedError as error:
        return dg.SkipReason(str(error))
    reported = Reported.model_validate_json(context.cursor) if context.cursor else Reported()
    report = Reported(at=now, seqs=recent.seqs)
    is_due = now - reported.at >= REPORT_EVERY and recent.completed_count
    if report.seqs == reported.seqs and not is_due:
        return dg.SkipReason("Nothing new to report.")
    return dg.SensorResult(asset_events=evaluate(recent), cursor=report.model_dump_json())


class Reported(BaseModel):
    """The sensor's cursor: when it last reported, and which problems."""

    at: datetime = datetime.min.replace(tzinfo=UTC)
    seqs: list[int] = []


@dataclass(frozen=True)
class Recent:
    """The images of the last day: how many completed, and the problems found, newest first."""

    completed_count: int
    problems: Sequence[Mapping[str, Any]]

    @classmethod
    def load(cls, catalogue: Catalogue, now: datetime) -> Self:
        """The images of the day before `now`."""
        since = now - WINDOW
        return cls(
            catalogue.count_events("completed", since),
            catalogue.list_events("check_failed", since, MAX_PROBLEMS),
        )

    @property
    def seqs(self) -> list[int]:
        """The sequence numbers that identify the problems."""
        return [problem["seq"] for problem in self.problems]


def evaluate(recent: Recent) -> list[dg.AssetCheckEvaluation]:
    """One evaluation per check."""
    return [_evaluate(name, recent) for name in CHECKS]


def _evaluate(name: str, recent: Recent) -> dg.AssetCheckEvaluation:
    count, prefix = recent.completed_count, f"{name}: "
    found = [
        f"{problem['image_id']}: {problem['detail'].removeprefix(prefix)}"
        for problem in recent.problems
        if problem["detail"].startswith(prefix)
    ]
    return dg.AssetCheckEvaluation(
        asset_key=dg.AssetKey("variants"),
        check_name=name,
        passed=not found,
        severity=SEVERITIES[name],
        description="; ".join(found)[:1000]
        or f"{count} images completed within a day, none with this problem.",
        metadata={"completed_count": count, "problem_count": len(found)},
    )


def check_variants(
    claim: Claim, catalogue: Catalogue, files: Storage, original: Original, renderer: Renderer
) -> tuple[Problems, dict[str, float | int]]:
    """Reads the claimed image's variants and compares them with their rows and the original.

    Returns:
        The problems by the names of CHECKS, and figures about the variants.
    """
    specs = {f"{claim.image_id}-{spec.id}": spec for spec in renderer.specs_for(claim.focus)}
    rows = (catalogue.get(claim.image_id) or {"variants": []})["variants"]
    variants = [row for row in rows if row["id"] in specs]
    contents = [read_stored(files, variant) for variant in variants]
    inspections = renderer.inspect(
        original.session, original.facts, contents, [specs[variant["id"]] for variant in variants]
    )
    found = [
        {**variant, "found": inspection, "spec": specs[variant["id"]], "bytes": len(content)}
        for variant, inspection, content in zip(variants, inspections, contents, strict=True)
    ]
    problems = {
        "complete": [*_find_incomplete(found, original, len(specs))],
        "clean": [
            f"{one['path']}: {', '.join(one['found'].attachments)}"
            for one in found
            if one["found"].attachments
        ],
        "small": [*_find_large(found, original)],
        "similar": [*_find_unlike(found)],
    }
    similarities = [one["found"].similarity for one in found if one["found"].similarity is not None]
    figures = {
        "variant_count": len(found),
        "bytes_in": original.facts.original_bytes,
        "bytes_out": sum(one["size"] for one in found if not one["is_alias"]),
        "compared_count": len(similarities),
        "min_similarity": round(min(similarities, default=0), 4),
    }
    # Rows that share a file have the same problems.
    return {name: list(dict.fromkeys(texts)) for name, texts in problems.items()}, figures


def is_wrong(problems: Problems) -> bool:
    """Whether a check of severity ERROR failed."""
    return any(problems[name] for name, severity in SEVERITIES.items() if severity == ERROR)


def refuse_wrong(problems: Problems) -> None:
    """Refuses variants that must not be shown.

    Raises:
        WrongVariantsError: a check of severity ERROR failed; another attempt renders them again.
    """
    for name, severity in SEVERITIES.items():
        if severity == ERROR and problems[name]:
            raise WrongVariantsError(f"the stored variants are not {name}: {problems[name][0]}")


def describe_problems(problems: Problems) -> str:
    """The problems of an image's variants as a text for people."""
    texts = [f"not {name}: {'; '.join(found)}" for name, found in problems.items() if found]
    return ". ".join(texts)[:1000] or "none"


def read_stored(files: Storage, variant: Mapping[str, Any]) -> bytes:
    """A variant's stored bytes, and enough of anything attached since to notice it."""
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
        spec: VariantSpec = variant["spec"]
        made = (inspection.format, inspection.width, inspection.height)
        if inspection.fault:
            yield f"{variant['path']} cannot be decoded: {inspection.fault}"
        elif made != (variant["format"], variant["width"], variant["height"]):
            yield f"{variant['path']} is {made} where its row says otherwise"
        elif not spec.is_possible(made[1:], (original.facts.width, original.facts.height)):
            yield f"{variant['path']} is {inspection.width} x {inspection.height} px"
        elif variant["bytes"] != variant["size"] and not inspection.attachments:
            yield f"{variant['path']} has {variant['bytes']:,} bytes, not {variant['size']:,}"


def _find_large(found: Iterable[Mapping[str, Any]], original: Original) -> Iterator[str]:
    webp = {variant["spec"].name: variant for variant in found if variant["format"] == "webp"}
    for variant in found:
        size, spec = variant["size"], variant["spec"]
        if size > original.facts.original_bytes and spec.quality is not None:
            original_bytes = original.facts.original_bytes
            yield f"{variant['path']} has {size:,} bytes, the original {original_bytes:,}"
        twin = webp.get(spec.name) if spec.format == "avif" else None
        if (
            twin
            and spec.quality <= twin["spec"].quality - AVIF_QUALITY_MARGIN
            and size > twin["size"]
        ):
            yield f"{variant['path']} has {size:,} bytes, {twin['path']} {twin['size']:,}"


def _find_unlike(found: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for variant in found:
        inspection: Inspection = variant["found"]
        similarity = inspection.similarity
        if similarity is not None and similarity < MIN_SIMILARITY:
            yield f"{variant['path']} has a similarity of {similarity:.3f} to the original"
