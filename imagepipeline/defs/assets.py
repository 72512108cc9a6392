"""The three assets of an image: they read, call, store and report; the work is elsewhere."""

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import replace

import dagster as dg

from imagepipeline.defs.attempts import GENERATION_TAG, RETRY_POLICY, attempt
from imagepipeline.defs.checks import check_variants, describe_problems, refuse_wrong
from imagepipeline.defs.partitions import uploads
from imagepipeline.errors import MissingMetadataError
from imagepipeline.imaging.palette import choose_visible
from imagepipeline.imaging.sandbox import Usage
from imagepipeline.imaging.variants import Renderer
from imagepipeline.index import EmbeddingStore
from imagepipeline.models import (
    Claim,
    Embedding,
    ImageMetadata,
    OriginalFacts,
    PixelFacts,
    Recipe,
    VisionAnswer,
)
from imagepipeline.originals import Original, Originals
from imagepipeline.paid_calls import PaidCalls, Receipt
from imagepipeline.services.embedder import Embedder
from imagepipeline.services.vision import VisionModel
from imagepipeline.storage import Storage
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.usage import CallUsage

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
    files: dg.ResourceParam[Storage],
    originals: dg.ResourceParam[Originals],
    vision: dg.ResourceParam[VisionModel],
    paid_calls: dg.ResourceParam[PaidCalls],
    renderer: dg.ResourceParam[Renderer],
) -> Iterator[dg.MaterializeResult[None]]:
    """A vision model's description, tags, category, dominant colours and mood of the image.

    The original is decoded in full first, in a process of its own, so a file that is not an image,
    too large or damaged fails here, without a paid call. The model gets a small JPEG copy. A
    provider that is down or overloaded is tried three times. The answer is in the image's row of
    the catalogue.
    """
    with attempt(context, catalogue) as claim:
        if claim is None:
            return
        original = originals.load(claim, catalogue)
        catalogue.save_original(claim, original.facts)
        answer, receipt = (
            known_answer(context, catalogue, claim, vision.recipe, original),
            Receipt(),
        )
        is_reused = answer is not None
        renderer.begin(original.session, original.facts)  # while the model answers
        if answer is None:
            prepared = original.prepared
            answer, receipt = paid_calls.make(
                claim,
                "metadata",
                vision.recipe,
                lambda: vision.describe(prepared.preview, prepared.facts),
                context.log.info,
            )
            answer = replace(answer, metadata=_with_visible_colors(answer.metadata, prepared.facts))
        catalogue.save_metadata(
            claim, answer.metadata, vision.recipe, original.facts.original_sha256
        )
        yield dg.MaterializeResult(
            data_version=_data_version(answer.metadata.embedding_text),
            metadata={
                "picture": _picture(original),
                **_describe_answer(answer),
                **_describe_receipt(receipt),
                "is_reused": is_reused,
                "provider": vision.recipe.provider,
                "model": vision.recipe.model,
                "settings": vision.recipe.settings,
                **_describe_original(original),
                "bytes_to_model": len(original.prepared.preview),
                **_describe_usage(original.usage),
                "attempt": context.retry_number + 1,
                "dagster/uri": files.locate(original.facts.path),
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
    files: dg.ResourceParam[Storage],
    originals: dg.ResourceParam[Originals],
    renderer: dg.ResourceParam[Renderer],
) -> Iterator[dg.MaterializeResult[None]]:
    """The image at 640, 1024 and 1920 px width, each as WebP and AVIF; never enlarged.

    They are upright, in sRGB, with transparency, and without EXIF, GPS or comments. Each file
    appears whole below `variants/` in the storage, and has a row in the catalogue. The stored files
    are read back and checked; wrong ones are made again. No provider is involved: if this fails,
    check the original and the disk.
    """
    with attempt(context, catalogue) as claim:
        if claim is None:
            return
        original = originals.load(claim, catalogue)
        catalogue.save_original(claim, original.facts)
        made, usage = renderer.render(original.session, original.facts)
        rendered = [(variant.spec.path_for(original.facts.path), variant) for variant in made]
        # Rows first: they refuse another image's path before its file is overwritten.
        catalogue.save_variants(claim, rendered)
        for variant_path, variant in rendered:
            files.write(variant_path, variant.content)
        found, figures = check_variants(claim, catalogue, files, original, renderer)
        catalogue.record_problems(claim, found)
        refuse_wrong(found)
        sha256 = original.facts.original_sha256
        catalogue.record_result(claim, "variants", renderer.recipe, sha256)
        yield dg.MaterializeResult(
            data_version=_data_version(sha256 + renderer.recipe.version),
            metadata={
                **figures,
                "problems": describe_problems(found),
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
                "dagster/uri": files.locate(rendered[0][0]).rpartition("/")[0],
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
    index: dg.ResourceParam[EmbeddingStore],
    paid_calls: dg.ResourceParam[PaidCalls],
) -> Iterator[dg.MaterializeResult[None]]:
    """The vector for search by meaning, from description, tags, category and mood; in LanceDB.

    The index has one row for each image and embedding model. After this asset the image is
    `completed`. If it fails with `missing_metadata`, materialize `metadata` of the partition first.
    """
    with attempt(context, catalogue) as claim:
        if claim is None:
            return
        row = catalogue.get(claim.image_id)
        if row is None or row["metadata"] is None:
            raise MissingMetadataError(
                f"{claim.image_id} has no metadata yet: materialize `metadata` first"
            )
        text, version = (
            ImageMetadata.model_validate(row["metadata"]).embedding_text,
            embedder.recipe.version,
        )
        known = index.get(claim.image_id, version) if "embedding" in row["made_by"] else None
        if known and known["text"] == text:  # the same text and model give the same vector
            result, receipt = Embedding(text, tuple(known["vector"]), version), Receipt()
        else:
            result, receipt = paid_calls.make(
                claim, "embedding", embedder.recipe, lambda: embedder.embed(text), context.log.info
            )
        index.upsert(claim, result)
        catalogue.record_result(
            claim, "embedding", embedder.recipe, hashlib.sha256(result.text.encode()).hexdigest()
        )
        yield dg.MaterializeResult(
            data_version=_data_version(result.text + result.version),
            metadata=_describe_embedding(result)
            | _describe_receipt(receipt)
            | {
                "is_reused": receipt == Receipt() and result.usage is None,
                "provider": embedder.recipe.provider,
                "model": embedder.recipe.model,
                "attempt": context.retry_number + 1,
            },
        )


def known_answer(
    context: dg.AssetExecutionContext,
    catalogue: Catalogue,
    claim: Claim,
    recipe: Recipe,
    original: Original,
) -> VisionAnswer | None:
    """The stored answer of the same model and prompt to the same bytes, or None.

    So runs of the queue do not pay twice. For a run that a person started, the model is asked
    again.
    """
    if GENERATION_TAG not in context.run.tags:
        return None
    row = catalogue.get(claim.image_id) or {}
    made = row.get("made_by", {}).get("metadata", {})
    is_same = (made.get("version"), made.get("input_sha256")) == (
        recipe.version,
        original.facts.original_sha256,
    )
    try:
        return (
            VisionAnswer(ImageMetadata.model_validate(row["metadata"]))
            if is_same and row["metadata"]
            else None
        )
    except ValueError:  # the stored answer is malformed: the model is asked again
        return None


def _with_visible_colors(metadata: ImageMetadata, facts: PixelFacts) -> ImageMetadata:
    return metadata.model_copy(
        update={"dominant_colors": choose_visible(metadata.dominant_colors, facts)}
    )


def _picture(original: Original) -> dg.MetadataValue:
    """A thumbnail of a few kB in Markdown, for the UI."""
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
    """The CPU time and memory that decoding or encoding took."""
    return {"cpu_seconds": round(usage.cpu_seconds, 3), "peak_memory_bytes": usage.peak_bytes}


def _describe_answer(answer: VisionAnswer) -> dict[str, dg.MetadataValue | str | int]:
    described = answer.metadata
    swatches = " ".join(f"`{value}`" for value in described.dominant_colors)
    return {
        "description": dg.MetadataValue.text(described.description),
        "tags": dg.MetadataValue.text(", ".join(described.tags)),
        "category": described.category,
        "dominant_colors": dg.MetadataValue.md(swatches),
        "mood": described.mood,
        **_describe_tokens(answer.usage),
    }


def _describe_embedding(result: Embedding) -> dict[str, str | int]:
    described: dict[str, str | int] = {
        "embedding_dim": len(result.vector),
        "text_characters": len(result.text),
    }
    return described | _describe_tokens(result.usage)


def _describe_tokens(usage: CallUsage | None) -> dict[str, int]:
    return {"tokens_in": usage.tokens_in, "tokens_out": usage.tokens_out} if usage else {}


def _describe_receipt(receipt: Receipt) -> dict[str, float]:
    described = {"call_seconds": receipt.seconds, "rate_limit_wait_seconds": receipt.waited_seconds}
    return described if receipt.cost_usd is None else described | {"cost_usd": receipt.cost_usd}


def _data_version(content: str) -> dg.DataVersion:
    # By content, so that an unchanged answer leaves the later assets fresh.
    return dg.DataVersion(hashlib.sha256(content.encode()).hexdigest()[:16])
