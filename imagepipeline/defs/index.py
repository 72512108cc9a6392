"""The assets `index` and `outdated`: what search finds, and what a change of settings outdated."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import dagster as dg
from pydantic import BaseModel

from imagepipeline.errors import PostponedError
from imagepipeline.models import Recipe, now_utc
from imagepipeline.needs import CAUSES, MISSING, MODEL, SETTINGS
from imagepipeline.stores.plans import Outdated, Plans
from imagepipeline.stores.vectors import measure_files

REPORT_EVERY = timedelta(hours=1)  # if nothing changes

index_spec = dg.AssetSpec(
    "index",
    deps=["embedding"],
    group_name="images",
    owners=["team:imagepipeline"],
    kinds={"lancedb"},
    description="""How many images search finds.

Search compares vectors of today's embedding model only: `searchable_count` images have one. After a
change of that model, `unsearchable_count` images are not found until `imagepipeline apply` has made
their embeddings again. Images without an embedding are in `outdated`.

`index_bytes` is its size on disk, in `fragment_count` files of vectors. Compaction keeps these few;
they include those it has replaced within the last two minutes. Both are missing for an index that
the code server cannot read: in a bucket, or on another machine.""",
)
outdated_spec = dg.AssetSpec(
    "outdated",
    deps=["metadata", "variants", "embedding"],
    group_name="images",
    owners=["team:imagepipeline"],
    kinds={"python"},
    description="""How many results a change of settings outdated.

For each asset, how many images need it and why. `missing`: never made, which includes images that
wait or failed. `model` and `settings`: made by another model, or with other settings, than today's.
`input`: the original or the text has changed since. What it costs to make them again:
`imagepipeline plan`. To make them: `imagepipeline apply`, or the job `apply_plan`.""",
)


def describe_outdated(
    found: Sequence[Outdated], recipes: Mapping[str, Recipe]
) -> dict[str, int | str]:
    """The metadata of `outdated`: a count for each asset and cause, also where it is 0."""
    counts: dict[str, int | str] = {
        f"{asset}_{cause}_count": 0 for asset in recipes for cause in CAUSES
    }
    counts |= {f"{one.asset}_{one.cause}_count": one.images for one in found}
    return counts | {f"{asset}_made_by_today": recipe.version for asset, recipe in recipes.items()}


def describe_index(
    image_count: int, found: Sequence[Outdated], recipe: Recipe, files: Mapping[str, int]
) -> dict[str, int | str]:
    """The metadata of `index`; `files` is what `measure_files` gives."""
    counts = {one.cause: one.images for one in found if one.asset == "embedding"}
    unsearchable_count = counts.get(MODEL, 0) + counts.get(SETTINGS, 0)
    return {
        "searchable_count": image_count - counts.get(MISSING, 0) - unsearchable_count,
        "unsearchable_count": unsearchable_count,
        **files,
        "model": recipe.version,
    }


class Reported(BaseModel):
    """The sensor's cursor: when it last reported, and what of each asset."""

    at: datetime = datetime.min.replace(tzinfo=UTC)
    assets: dict[str, dict[str, int | str]] = {}


@dg.sensor(minimum_interval_seconds=300, default_status=dg.DefaultSensorStatus.RUNNING)
def index_sensor(
    context: dg.SensorEvaluationContext,
    plans: dg.ResourceParam[Plans],
    recipes: dg.ResourceParam[Mapping[str, Recipe]],
    index_uri: dg.ResourceParam[str],
) -> dg.SensorResult | dg.SkipReason:
    """Reports what search finds and what is outdated: every five minutes if that changes.

    Otherwise it reports hourly. It starts no run.
    """
    now = now_utc()
    try:
        image_count, found = plans.count_all(), plans.count_outdated(recipes)
        planned = plans.leave_out_failed(found, recipes)
    except PostponedError as error:
        return dg.SkipReason(str(error))
    assets = {
        "index": describe_index(image_count, found, recipes["embedding"], measure_files(index_uri)),
        "outdated": describe_outdated(planned, recipes),
    }
    reported = Reported.model_validate_json(context.cursor) if context.cursor else Reported()
    if assets == reported.assets and now - reported.at < REPORT_EVERY:
        return dg.SkipReason("Nothing new to report.")
    return dg.SensorResult(
        asset_events=[
            dg.AssetMaterialization(name, metadata=metadata) for name, metadata in assets.items()
        ],
        cursor=Reported(at=now, assets=assets).model_dump_json(),
    )
