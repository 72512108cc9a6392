"""The three assets of an image, in a run of its own."""

from collections.abc import Iterator

import dagster as dg

from imagepipeline.defs.attempts import RETRY_POLICY, Work, attempt
from imagepipeline.defs.outcomes import ORIGINAL
from imagepipeline.defs.partitions import uploads
from imagepipeline.defs.showing import link_to
from imagepipeline.defs.stages import Made, make_embedding, make_metadata, make_variants
from imagepipeline.imaging.variants import Renderer
from imagepipeline.index import EmbeddingStore
from imagepipeline.originals import Originals
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.services.embedder import Embedder
from imagepipeline.services.vision import VisionModel
from imagepipeline.storage import Storage
from imagepipeline.stores.catalogue import Catalogue

OWNERS = ["team:imagepipeline"]


@dg.asset(
    partitions_def=uploads,
    deps=[ORIGINAL],
    group_name="images",
    kinds={"python", "ai"},
    owners=OWNERS,
    retry_policy=RETRY_POLICY,
    output_required=False,
)
def metadata(
    context: dg.AssetExecutionContext,
    catalogue: dg.ResourceParam[Catalogue],
    files: dg.ResourceParam[Storage],
    originals: dg.ResourceParam[Originals],
    vision: dg.ResourceParam[VisionModel],
    paid_calls: dg.ResourceParam[PaidCalls],
    renderer: dg.ResourceParam[Renderer],
) -> Iterator[dg.MaterializeResult[None]]:
    """A vision model's description, tags, category, dominant colours and mood of the image.

    An answer of today's model and prompt to the same bytes is reused. Otherwise the original is
    decoded in full first, in a process of its own, so a file that is not an image, too large or
    damaged fails here, without a paid call. The model gets a small JPEG copy. A provider that is
    down or overloaded is tried three times. The answer is in the image's row of the catalogue. To
    ask again all the same, launch the run with the tag `imagepipeline/anew` = `metadata`.
    """
    with attempt(context, catalogue, originals) as work:
        if work is not None:
            made = make_metadata(work, catalogue, files, originals, vision, paid_calls, renderer)
            yield _to_result(context, made, work)


@dg.asset(
    partitions_def=uploads,
    deps=[ORIGINAL, metadata],
    group_name="images",
    kinds={"python", "pillow"},
    owners=OWNERS,
    retry_policy=RETRY_POLICY,
    output_required=False,
)
def variants(
    context: dg.AssetExecutionContext,
    catalogue: dg.ResourceParam[Catalogue],
    files: dg.ResourceParam[Storage],
    originals: dg.ResourceParam[Originals],
    renderer: dg.ResourceParam[Renderer],
) -> Iterator[dg.MaterializeResult[None]]:
    """The image in the sizes and formats that the settings name; never enlarged.

    They are upright, in sRGB, transparent if the format can be, and have no EXIF, GPS or comments.
    Each file appears whole below `variants/`, and has a row in the catalogue. The stored files are
    read back and checked; wrong ones are made again. No provider is involved: if this fails,
    check the original and the disk.
    """
    with attempt(context, catalogue, originals) as work:
        if work is not None:
            made = make_variants(work, catalogue, files, originals, renderer)
            yield _to_result(context, made, work)


@dg.asset(
    partitions_def=uploads,
    deps=[metadata, variants],
    group_name="images",
    kinds={"python", "lancedb"},
    owners=OWNERS,
    retry_policy=RETRY_POLICY,
    output_required=False,
)
def embedding(
    context: dg.AssetExecutionContext,
    catalogue: dg.ResourceParam[Catalogue],
    originals: dg.ResourceParam[Originals],
    embedder: dg.ResourceParam[Embedder],
    index: dg.ResourceParam[EmbeddingStore],
    paid_calls: dg.ResourceParam[PaidCalls],
) -> Iterator[dg.MaterializeResult[None]]:
    """The vector for search by meaning, from description, tags, category and mood; in LanceDB.

    The index has one row for each image and embedding model. After this asset the image is
    `completed`. If it fails with `missing_metadata`, materialize `metadata` of the partition first.
    """
    with attempt(context, catalogue, originals) as work:
        if work is not None:
            made = make_embedding(work, catalogue, embedder, index, paid_calls)
            yield _to_result(context, made, work)


def _to_result(
    context: dg.AssetExecutionContext, made: Made, work: Work
) -> dg.MaterializeResult[None]:
    link = {"see_original": link_to("original", work.claim.image_id)}
    # Not in the result, whose metadata Dagster stores twice: with the output of the step, too.
    context.add_asset_metadata({**made.metadata, **link})
    return dg.MaterializeResult(data_version=dg.DataVersion(made.data_version))
