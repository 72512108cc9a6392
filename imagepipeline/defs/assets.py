"""The three assets of an image. Each reads, calls, stores and reports; the work itself is done elsewhere."""

import base64
import hashlib
from collections.abc import Iterator

import dagster as dg

from imagepipeline.defs.failures import RETRY_POLICY, attempt
from imagepipeline.defs.originals import Original, Originals
from imagepipeline.defs.partitions import uploads
from imagepipeline.errors import MissingMetadataError
from imagepipeline.imaging.sandbox import Usage
from imagepipeline.imaging.variants import Renderer
from imagepipeline.models import Embedding, ImageMetadata, OriginalFacts, VisionAnswer
from imagepipeline.services.embedder import Embedder
from imagepipeline.services.vision import VisionModel
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.files import FileStore
from imagepipeline.stores.vectors import EmbeddingIndex

OWNERS = ["team:imagepipeline"]


@dg.asset(
    partitions_def=uploads,
    group_name="images",
    kinds={"python", "ai"},
    owners=OWNERS,
    retry_policy=RETRY_POLICY,
    output_required=False,
)
def metadata(
    context: dg.AssetExecutionContext,
    catalogue: dg.ResourceParam[Catalogue],
    files: dg.ResourceParam[FileStore],
    originals: dg.ResourceParam[Originals],
    vision: dg.ResourceParam[VisionModel],
) -> Iterator[dg.MaterializeResult[None]]:
    """What the image shows: description, tags, category, dominant colours and mood, by a vision model.

    Made from a small JPEG copy of the original; the original itself is decoded in full first, in a process of its
    own, so a file that is no image, too large or damaged fails here, at once and without a paid call. A provider
    that is down or asks to slow down is tried three times in all. Stored in the catalogue's row of the image.
    """
    with attempt(context, catalogue) as claim:
        if claim is None:
            return
        original = originals.load(claim.image_id, claim.path)
        catalogue.save_original(claim, original.facts)
        answer = vision.describe(original.prepared.preview, original.prepared.facts)
        catalogue.save_metadata(claim, answer.metadata)
        catalogue.record_result(claim, "metadata", vision.recipe, original.facts.original_sha256)
        yield dg.MaterializeResult(
            data_version=_data_version(answer.metadata.embedding_text),
            metadata={
                "picture": _picture(original),
                **_describe_answer(answer),
                "provider": vision.recipe.provider,
                "model": vision.recipe.model,
                "settings": vision.recipe.settings,
                **_describe_original(original),
                "bytes_to_model": len(original.prepared.preview),
                **_describe_usage(original.usage),
                "attempt": context.retry_number + 1,
                "dagster/uri": str(files.root / original.facts.path),
            },
        )


@dg.asset(
    partitions_def=uploads,
    deps=[metadata],
    group_name="images",
    kinds={"python", "pillow"},
    owners=OWNERS,
    retry_policy=RETRY_POLICY,
    output_required=False,
)
def variants(
    context: dg.AssetExecutionContext,
    catalogue: dg.ResourceParam[Catalogue],
    files: dg.ResourceParam[FileStore],
    originals: dg.ResourceParam[Originals],
    renderer: dg.ResourceParam[Renderer],
) -> Iterator[dg.MaterializeResult[None]]:
    """The image at 640, 1024 and 1920 px width, each as WebP and AVIF; never enlarged.

    Upright, in sRGB, with its transparency and without EXIF, GPS or comments. Each file appears in one piece
    below `variants/` of the storage root, and has a row in the catalogue. Needs no provider: if it fails, look
    at the original and at the disk.
    """
    with attempt(context, catalogue) as claim:
        if claim is None:
            return
        original = originals.load(claim.image_id, claim.path)
        catalogue.save_original(claim, original.facts)
        made, usage = renderer.render(original.session)
        rendered = [(variant.spec.path_for(original.facts.path), variant) for variant in made]
        # Rows first: they refuse a path that is another image's before its file is overwritten.
        catalogue.save_variants(claim, rendered)
        for variant_path, variant in rendered:
            files.write(variant_path, variant.content)
        sha256 = original.facts.original_sha256
        catalogue.record_result(claim, "variants", renderer.recipe, sha256)
        yield dg.MaterializeResult(
            data_version=_data_version(sha256 + renderer.recipe.version),
            metadata={
                "variant_count": len(rendered),
                "bytes_in": original.facts.original_bytes,
                "bytes_out": sum(len(variant.content) for _, variant in rendered),
                "variants": dg.MetadataValue.table(
                    records=[
                        dg.TableRecord(
                            {
                                "path": variant_path,
                                "width_px": variant.width,
                                "height_px": variant.height,
                                "bytes": len(variant.content),
                            }
                        )
                        for variant_path, variant in rendered
                    ]
                ),
                "settings": renderer.recipe.settings,
                "dominant_color": original.facts.dominant_color,
                "placeholder": dg.MetadataValue.md(f"![placeholder]({original.facts.placeholder})"),
                **_describe_usage(usage),
                "attempt": context.retry_number + 1,
                "dagster/uri": str(files.root / rendered[0][0]).rpartition("/")[0],
            },
        )


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
    embedder: dg.ResourceParam[Embedder],
    index: dg.ResourceParam[EmbeddingIndex],
) -> Iterator[dg.MaterializeResult[None]]:
    """The vector by which the image is found: of its description, tags, category and mood, kept in LanceDB.

    One row per image and embedding model, replaced when the image is done again. After it the image is
    `completed`. If it fails with `missing_metadata`, materialize `metadata` of the partition first.
    """
    with attempt(context, catalogue) as claim:
        if claim is None:
            return
        row = catalogue.get(claim.image_id)
        if row is None or row["metadata"] is None:
            raise MissingMetadataError(f"{claim.image_id} has no metadata yet: materialize `metadata` first")
        result = embedder.embed(ImageMetadata.model_validate(row["metadata"]).embedding_text)
        index.upsert(claim, result)
        catalogue.record_result(claim, "embedding", embedder.recipe, hashlib.sha256(result.text.encode()).hexdigest())
        yield dg.MaterializeResult(
            data_version=_data_version(result.text + result.version),
            metadata=_describe_embedding(result)
            | {
                "provider": embedder.recipe.provider,
                "model": embedder.recipe.model,
                "attempt": context.retry_number + 1,
            },
        )


def _picture(original: Original) -> dg.MetadataValue:
    """A thumbnail in Markdown, a few kB, for where the operator looks."""
    thumbnail = base64.b64encode(original.prepared.thumbnail).decode()
    return dg.MetadataValue.md(f"![the image](data:image/jpeg;base64,{thumbnail})")


def _describe_original(original: Original) -> dict[str, str | int]:
    facts: OriginalFacts = original.facts
    described: dict[str, str | int] = {
        "bytes_in": facts.original_bytes,
        "width_px": facts.width,
        "height_px": facts.height,
        "format": original.prepared.format,
        "content_sha256": facts.original_sha256,
    }
    return described | {"flaw": facts.flaw} if facts.flaw else described


def _describe_usage(usage: Usage) -> dict[str, float | int]:
    """What decoding or encoding took."""
    return {"cpu_seconds": round(usage.cpu_seconds, 3), "peak_memory_bytes": usage.peak_bytes}


def _describe_answer(answer: VisionAnswer) -> dict[str, dg.MetadataValue | str | int]:
    described = answer.metadata
    swatches = " ".join(f"`{value}`" for value in described.dominant_colors)
    tokens = {"tokens_in": answer.tokens_in, "tokens_out": answer.tokens_out}
    return {
        "description": dg.MetadataValue.text(described.description),
        "tags": dg.MetadataValue.text(", ".join(described.tags)),
        "category": described.category,
        "dominant_colors": dg.MetadataValue.md(swatches),
        "mood": described.mood,
        **{name: count for name, count in tokens.items() if count is not None},
    }


def _describe_embedding(result: Embedding) -> dict[str, str | int]:
    described: dict[str, str | int] = {"embedding_dim": len(result.vector), "text_characters": len(result.text)}
    return described if result.tokens_in is None else described | {"tokens_in": result.tokens_in}


def _data_version(content: str) -> dg.DataVersion:
    # By content, so that an answer that did not change leaves what is made of it fresh.
    return dg.DataVersion(hashlib.sha256(content.encode()).hexdigest()[:16])
