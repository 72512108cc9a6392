"""Restoring: an image that has left Dagster comes back as its catalogue row tells of it."""

from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg

from imagepipeline.dagster_records import KEPT_METADATA, DagsterRecords
from imagepipeline.defs.assets import embedding, metadata, variants
from imagepipeline.defs.outcomes import ORIGINAL, build_outcome
from imagepipeline.defs.showing import describe_metadata, link_to
from imagepipeline.defs.stages import build_data_version
from imagepipeline.models import ImageMetadata, Recipe, Status
from imagepipeline.stores.catalogue import Catalogue, read_focus
from imagepipeline.text import hash_text

DATA_VERSION_TAG, CODE_VERSION_TAG = "dagster/data_version", "dagster/code_version"
DEPS = {one.key: one.asset_deps[one.key] for one in (metadata, variants, embedding)}
# What Dagster records for `original`, which has no data version.
OF_ORIGINAL = {
    f"dagster/input_data_version/{ORIGINAL.to_user_string()}": "INITIAL",
    f"dagster/input_event_pointer/{ORIGINAL.to_user_string()}": "NULL",
}
RESTORED = "from the catalogue, because its runs were pruned"


def restore(instance: dg.DagsterInstance, catalogue: Catalogue, image_id: str) -> None:
    """Adds an image's partition, with a materialization of each result it has.

    It may be repeated: the newest materialization counts.

    Raises:
        PostponedError: the catalogue does not answer.
    """
    records = DagsterRecords(instance)
    for made in _build_materializations(catalogue, image_id):
        instance.report_runless_asset_event(relate(instance, made))
    records.add_partition(image_id)  # last: an image with a partition counts as restored
    if not catalogue.get_states([image_id]):  # it was erased meanwhile
        records.remove_events(image_id)
        records.remove_partition(image_id)


def _build_materializations(
    catalogue: Catalogue, image_id: str
) -> Iterator[dg.AssetMaterialization]:
    """What the image's row tells of each asset, without results of an earlier original or text."""
    row = catalogue.get(image_id)
    if row is None:
        return
    described = ImageMetadata.read(row["metadata"])
    text = described.embedding_text if described else ""
    original_sha256 = row["original_sha256"] or ""
    inputs = {"metadata": original_sha256, "variants": original_sha256}
    contents: dict[str, str] = {"metadata": text}
    for asset, made in row["made_by"].items():
        recipe = Recipe(made["provider"], made["model"], made["settings"])
        focus = read_focus(row["focus"]) or ""
        contents |= {"variants": f"{original_sha256}{recipe.version}{focus}"}
        contents |= {"embedding": text + recipe.version}
        if made["input_sha256"] != inputs.get(asset, hash_text(text)):
            continue
        yield dg.AssetMaterialization(
            asset,
            partition=image_id,
            metadata={
                "restored": RESTORED,
                **_describe(asset, row, described),
                "provider": recipe.provider,
                "model": recipe.model,
                "settings": recipe.settings,
                "see_original": link_to("original", image_id),
            },
            tags={
                DATA_VERSION_TAG: build_data_version(contents[asset]),
                CODE_VERSION_TAG: recipe.version,
            },
        )
    if not Status(row["status"]).has_ended:
        return  # its run will tell
    outcome = build_outcome(catalogue, image_id)
    shown = {name: value for name, value in outcome.metadata.items() if name in KEPT_METADATA}
    yield outcome._replace(metadata={**shown, "restored": dg.MetadataValue.text(RESTORED)})


def _describe(
    asset: str, row: Mapping[str, Any], described: ImageMetadata | None
) -> dict[str, dg.MetadataValue | str | int]:
    if asset == "variants":
        return {"bytes_out": sum(one["size"] for one in row["variants"] if not one["is_alias"])}
    if asset != "metadata" or described is None:
        return {}
    return {
        name: value for name, value in describe_metadata(described).items() if name in KEPT_METADATA
    }


def relate(instance: dg.DagsterInstance, made: dg.AssetMaterialization) -> dg.AssetMaterialization:
    """Names the results of earlier assets from which this one was made, as Dagster's own do.

    Without them, the UI would call the result unsynced.
    """
    if made.asset_key == ORIGINAL:
        return made
    partition = str(made.partition)
    tags = dict(made.tags or {})
    for dep_key in DEPS[made.asset_key]:
        if dep_key == ORIGINAL:
            tags |= OF_ORIGINAL
            continue
        dep = dep_key.to_user_string()
        newest = instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=dep_key, asset_partitions=[partition]), limit=1
        ).records
        for record in newest:
            materialization = record.asset_materialization
            version = ((materialization and materialization.tags) or {}).get(DATA_VERSION_TAG, "")
            tags[f"dagster/input_data_version/{dep}"] = version
            tags[f"dagster/input_event_pointer/{dep}"] = str(record.storage_id)
    return made._replace(tags=tags)
