"""What each asset does for one image, in a run of its own or among many: read, call, store.

The work itself is elsewhere; Dagster sees it through `assets` and `batches`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from imagepipeline.defs.attempts import Work
from imagepipeline.defs.checks import (
    check_variants,
    describe_problems,
    is_wrong,
    read_stored,
    refuse_wrong,
)
from imagepipeline.defs.showing import (
    describe_metadata,
    show_picture,
    tabulate,
)
from imagepipeline.describing import find_source
from imagepipeline.errors import MissingMetadataError, ProviderRejectedError, StaleClaimError
from imagepipeline.imaging.palette import with_visible_colors
from imagepipeline.imaging.sandbox import Usage
from imagepipeline.imaging.variants import Renderer
from imagepipeline.index import EmbeddingStore
from imagepipeline.models import (
    Claim,
    Embedding,
    ImageMetadata,
    OriginalFacts,
    Recipe,
    Variant,
    VariantSpec,
    VisionAnswer,
    place_variants,
)
from imagepipeline.needs import is_variant_current
from imagepipeline.originals import Original, Originals
from imagepipeline.paid_calls import Kept, PaidCalls, Receipt
from imagepipeline.services.embedder import Embedder
from imagepipeline.services.vision import VisionModel
from imagepipeline.storage import Storage
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.database import outlast
from imagepipeline.text import hash_text
from imagepipeline.usage import CallUsage

ASKED = "a person asked for it"
MAX_TWINS = 3  # images with the same text whose vector is looked for


@dataclass(frozen=True)
class Made:
    """An asset's result for one image, as Dagster records it.

    Attributes:
        data_version: by content, so that an unchanged result leaves later assets fresh.
        metadata: what the UI shows.
        is_current: whether the stored result was current, so that nothing was made.
    """

    data_version: str
    metadata: Mapping[str, Any]
    is_current: bool = False


def make_metadata(
    work: Work,
    catalogue: Catalogue,
    files: Storage,
    originals: Originals,
    vision: VisionModel,
    paid_calls: PaidCalls,
    renderer: Renderer,
) -> Made:
    """Describes the image, or confirms that its description is current.

    Outdated variants are rendered while the model answers.
    """
    claim = work.claim
    original = originals.load(claim, catalogue)
    note_original(catalogue, claim, original)
    causes = find_causes(work, catalogue, metadata=vision.recipe, variants=renderer.recipe)
    cause = causes["metadata"]
    kept = Kept("metadata", vision.recipe, original.sha256, VisionAnswer)
    row = {} if cause else catalogue.get(claim.image_id) or {}
    if known := ImageMetadata.read(row.get("metadata")):
        catalogue.confirm_result(claim, "metadata")
        paid_calls.forget(kept)
        return Made(
            build_data_version(known.embedding_text),
            {
                "picture": show_picture(row["placeholder"]),
                **_describe_answer(VisionAnswer(known)),
                **_describe_recipe(vision.recipe),
                "is_reused": True,
            },
            is_current=True,
        )
    if causes["variants"]:
        known_row = catalogue.get(claim.image_id) or {"variants": []}
        _, missing = sort_variants(claim, causes["variants"], known_row, files, original, renderer)
        if missing:
            rendered = choose_rendered(original, renderer, known_row, missing)
            renderer.begin(original.session, original.facts, rendered)
    described, translate = None, None
    if cause != ASKED:
        described, translate = find_source(
            catalogue, vision, claim.image_id, original.sha256, cause
        )
    is_reused = described is not None
    if described:
        answer, receipt = VisionAnswer(described), Receipt()
    else:
        prepared = original.prepared
        answer, receipt = paid_calls.make(
            claim,
            "metadata",
            vision.recipe,
            translate or (lambda: vision.describe(prepared.preview, prepared.facts)),
            work.report,
            kept,
        )
        answer = replace(answer, metadata=with_visible_colors(answer.metadata, prepared.facts))
    catalogue.save_metadata(claim, answer.metadata, vision.recipe, original.sha256)
    paid_calls.forget(kept)
    return Made(
        build_data_version(answer.metadata.embedding_text),
        {
            "picture": show_picture(original.prepared.thumbnail),
            **_describe_answer(answer),
            **_describe_receipt(receipt),
            "is_reused": is_reused,
            "cause": cause,
            **_describe_recipe(vision.recipe),
            **_describe_original(original),
            "bytes_to_model": 0 if translate else len(original.prepared.preview),
            **_describe_usage(original.usage),
            "attempt": work.number,
            "dagster/uri": files.locate(original.facts.path),
        },
    )


def make_variants(
    work: Work, catalogue: Catalogue, files: Storage, originals: Originals, renderer: Renderer
) -> Made:
    """Renders, stores and checks the variants that are not current and in place.

    The others stay untouched. Those that the settings no longer have are removed at the end.
    """
    claim = work.claim
    original = originals.load(claim, catalogue)
    note_original(catalogue, claim, original)
    cause = find_causes(work, catalogue, variants=renderer.recipe)["variants"]
    row = catalogue.get(claim.image_id) or {"variants": []}
    kept, missing = sort_variants(claim, cause, row, files, original, renderer)
    recipes = {
        f"{claim.image_id}-{spec.id}": renderer.recipe_of(spec)
        for spec in renderer.specs_for(claim.focus)
    }
    shown: dict[str, Any] = {"is_reused": True}
    if missing:
        shown = _render_variants(
            claim,
            catalogue,
            files,
            original,
            renderer,
            row,
            missing,
            {one: recipes[one] for one in kept},
        )
    if missing or cause:
        catalogue.record_result(claim, "variants", renderer.recipe, original.sha256, recipes)
        shown |= {
            "is_reused": not missing,
            "rendered_count": len(missing),
            "cause": cause or "its files were not in place",
            "attempt": work.number,
        }
    else:
        catalogue.confirm_result(claim, "variants")
    row = catalogue.get(claim.image_id) or row
    remove_others(claim, catalogue, files, row["variants"], recipes)
    stored = [one for one in row["variants"] if one["id"] in recipes]
    return Made(
        build_data_version(f"{original.sha256}{renderer.recipe.version}{claim.focus or ''}"),
        {
            **shown,
            "variants": tabulate(stored, row["original_bytes"]),
            "settings": renderer.recipe.settings,
            "dagster/uri": files.locate(stored[0]["path"]).rpartition("/")[0],
        },
        is_current=not (missing or cause),
    )


def sort_variants(
    claim: Claim,
    cause: str | None,
    row: Mapping[str, Any],
    files: Storage,
    original: Original,
    renderer: Renderer,
) -> tuple[list[str], list[VariantSpec]]:
    """The IDs of rows of variants that can stay as they are, and the specs of those that cannot."""
    rows = {one["id"]: one for one in row["variants"]}
    made = row.get("made_by", {}).get("variants")
    placed = place(original, renderer, row)
    kept, missing = [], []
    for spec in renderer.specs_for(claim.focus):
        known = rows.get(f"{claim.image_id}-{spec.id}")
        if (
            cause != ASKED
            and known
            and is_variant_current(known, renderer.recipe_of(spec), made, original.sha256)
            and known["path"] in (placed[spec.id], spec.path_for(original.path))
            and (spec.is_alias(placed[spec.id]) or not known["is_alias"])  # apps are told of it
            and len(read_stored(files, known)) == known["size"]
        ):
            kept.append(str(known["id"]))
        else:
            missing.append(spec)
    return kept, missing


def place(original: Original, renderer: Renderer, row: Mapping[str, Any]) -> dict[str, str]:
    """The path of each variant by the spec's ID; the image's row has the original's size."""
    return place_variants(renderer.specs, row["width"], row["height"], original.path)


def choose_rendered(
    original: Original,
    renderer: Renderer,
    row: Mapping[str, Any],
    missing: Sequence[VariantSpec],
) -> list[VariantSpec]:
    """Those of the missing variants that have a file of their own, and none that stays as it is."""
    placed = place(original, renderer, row)
    staying = {f"{row['id']}-{spec.id}" for spec in renderer.specs} - {
        f"{row['id']}-{spec.id}" for spec in missing
    }
    files = {one["path"] for one in row["variants"] if one["id"] in staying}
    chosen = []
    for spec in missing:
        if placed[spec.id] not in files:
            files.add(placed[spec.id])
            chosen.append(spec)
    return chosen


def _render_variants(
    claim: Claim,
    catalogue: Catalogue,
    files: Storage,
    original: Original,
    renderer: Renderer,
    row: Mapping[str, Any],
    missing: Sequence[VariantSpec],
    kept: Mapping[str, str],
) -> dict[str, Any]:
    """Renders what is missing, stores and checks it, and says what the UI shows of that."""
    chosen = choose_rendered(original, renderer, row, missing)
    made, usage = renderer.render(original.session, original.facts, chosen)
    placed = place(original, renderer, row)
    contents = {placed[variant.spec.id]: variant.content for variant in made}
    sizes = {placed[one.spec.id]: (one.width, one.height) for one in made}
    shared = {one["path"]: one for one in row["variants"] if one["id"] in kept}
    variants = []
    for spec in missing:
        path = placed[spec.id]
        if path in contents:
            variants.append((path, Variant(spec, *sizes[path], contents[path])))
        else:
            known = shared[path]
            content = read_stored(files, known)
            variants.append((path, Variant(spec, known["width"], known["height"], content)))
    # Rows first: they refuse another image's path before its file is overwritten.
    catalogue.save_variants(claim, variants, kept)
    # A file of a larger original, of an earlier path or version must not be served any more.
    earlier = {one["path"] for one in row["variants"]}
    unused = earlier.union(spec.path_for(original.path) for spec in missing) - {*placed.values()}
    written = {path: len(content) for path, content in contents.items()}
    repair = partial(_repair, claim, catalogue, files, original.sha256, written, unused)
    with _changing(claim, catalogue, repair):
        for path, content in contents.items():
            files.write(path, content)
        for path in catalogue.find_free_paths(unused) if unused else ():
            files.delete(path)
    found, figures = check_variants(claim, catalogue, files, original, renderer)
    catalogue.record_problems(claim, found)
    if is_wrong(found):
        catalogue.distrust_variants(claim)
    refuse_wrong(found)
    return {
        **figures,
        "problems": describe_problems(found),
        "dominant_color": original.facts.dominant_color,
        "placeholder": show_picture(original.facts.placeholder),
        **_describe_usage(usage),
    }


def remove_others(
    claim: Claim,
    catalogue: Catalogue,
    files: Storage,
    rows: Sequence[Mapping[str, Any]],
    row_ids: Collection[str],
) -> None:
    """Removes files and rows of an image's variants except these; it is safe to repeat."""
    paths = {one["path"] for one in rows if one["id"] in row_ids}
    others = {one["id"]: one["path"] for one in rows if one["id"] not in row_ids}
    if not others:
        return
    unused = set(others.values()) - paths
    with _changing(claim, catalogue, partial(_repair, claim, catalogue, files, "", {}, unused)):
        for path in unused:
            files.delete(path)
    catalogue.remove_variants(claim, others)


@contextmanager
def _changing(claim: Claim, catalogue: Catalogue, repair: Callable[[], None]) -> Iterator[None]:
    """Repairs what the body did to files if the image had been taken over by then.

    Files have no fence: a process that was frozen in a write goes on where it was, even hours after
    another run has completed the image.

    Raises:
        StaleClaimError: the image was taken over.
    """
    try:
        yield
    finally:
        if not outlast(partial(catalogue.holds, claim)):
            outlast(repair)
            raise StaleClaimError(f"{claim.image_id} was taken over while its files were written")


def _repair(
    claim: Claim,
    catalogue: Catalogue,
    files: Storage,
    sha256: str,
    written: Mapping[str, int],
    deleted: Collection[str],
) -> None:
    """Has variants made again, unless all files that were changed are what they should be.

    Args:
        claim: the one that was lost.
        catalogue: knows whose the paths are by now.
        files: what was changed.
        sha256: of the original that the written files are of.
        written: the number of bytes of each written file, by path.
        deleted: the paths of files that were deleted.
    """
    row = catalogue.get(claim.image_id)
    sizes = {one["path"]: one["size"] for one in row["variants"]} if row else {}
    is_same = row is not None and row["original_sha256"] == sha256
    if (
        is_same  # the run that took over has made the same files
        and all(sizes.get(path) == size for path, size in written.items())
        and catalogue.find_free_paths(deleted) == set(deleted)
    ):
        return
    for path in catalogue.distrust_files(claim.image_id, {*written, *deleted}):
        files.delete(path)


def make_embedding(
    work: Work,
    catalogue: Catalogue,
    embedder: Embedder,
    index: EmbeddingStore,
    paid_calls: PaidCalls,
) -> Made:
    """Embeds the image's text and stores the vector, or confirms that the stored one is current.

    Raises:
        MissingMetadataError: there is no text.
    """
    claim = work.claim
    row = catalogue.get(claim.image_id)
    if row is None or row["metadata"] is None:
        raise MissingMetadataError(
            f"{claim.image_id} has no metadata yet: materialize `metadata` first"
        )
    text = ImageMetadata.model_validate(row["metadata"]).embedding_text
    input_sha256 = hash_text(text)
    cause = find_causes(work, catalogue, embedding=embedder.recipe)["embedding"]
    kept = Kept("embedding", embedder.recipe, input_sha256, Embedding)
    result = None if cause else find_vector(index, [claim.image_id], text, embedder.recipe)
    if is_current := result is not None:
        catalogue.confirm_result(claim, "embedding")
    elif cause != ASKED:
        twins = catalogue.find_twins("embedding", embedder.recipe, input_sha256, MAX_TWINS)
        result = find_vector(index, twins, text, embedder.recipe)
    is_reused, receipt = result is not None, Receipt()
    if result is None:
        result, receipt = paid_calls.make(
            claim,
            "embedding",
            embedder.recipe,
            lambda: embedder.embed(text),
            work.report,
            kept,
        )
    if not is_current:
        # A call may take minutes, and the index cannot refuse a row that was erased meanwhile.
        if not catalogue.holds(claim):
            raise StaleClaimError(f"{claim.image_id} was taken over while its text was embedded")
        try:
            index.upsert(claim, result)
        except ProviderRejectedError:  # kept, the vector would be refused again after a retry
            paid_calls.forget(kept)
            raise
        catalogue.record_result(claim, "embedding", embedder.recipe, input_sha256)
    paid_calls.forget(kept)
    return Made(
        build_data_version(result.text + result.version),
        {
            **_describe_embedding(result),
            **_describe_receipt(receipt),
            "is_reused": is_reused,
            **({"cause": cause} if cause else {}),
            **_describe_recipe(embedder.recipe),
            "attempt": work.number,
        },
        is_current,
    )


def note_original(catalogue: Catalogue, claim: Claim, original: Original) -> None:
    """Stores the facts of an original that is not the one the catalogue knows; raises as it does.

    Only for that is it decoded here.
    """
    if (original.path, original.sha256) != (claim.last_path, claim.last_sha256):
        catalogue.save_original(claim, original.facts)


def find_causes(work: Work, catalogue: Catalogue, **recipes: Recipe) -> dict[str, str | None]:
    """Why these assets must be made: ASKED, one of `needs.CAUSES`, or None if current."""
    causes = catalogue.find_causes(work.claim.image_id, recipes)
    return {
        asset: ASKED if work.asked & {asset, "all"} else cause for asset, cause in causes.items()
    }


def find_vector(
    index: EmbeddingStore, image_ids: Sequence[str], text: str, recipe: Recipe
) -> Embedding | None:
    """The vector of a text, if the index has it for one of these images."""
    for image_id in image_ids:
        known = index.get(image_id, recipe.version)
        if known and known["text"] == text:
            return Embedding(text, tuple(known["vector"]), recipe.version)
    return None


def _describe_recipe(recipe: Recipe) -> dict[str, str]:
    return {"provider": recipe.provider, "model": recipe.model, "settings": recipe.settings}


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


def _describe_answer(answer: VisionAnswer) -> dict[str, Any]:
    return describe_metadata(answer.metadata) | _describe_tokens(answer.usage)


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


def build_data_version(content: str) -> str:
    """A data version of the same content is the same."""
    return hash_text(content)[:16]
