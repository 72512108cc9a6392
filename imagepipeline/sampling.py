"""Samples: what today's settings make of some planned images, beside what the images have."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from imagepipeline.describing import find_source
from imagepipeline.errors import (
    FormatRefusedError,
    MissingOriginalError,
    PermanentError,
    RetryableError,
)
from imagepipeline.imaging.palette import with_visible_colors
from imagepipeline.imaging.variants import Renderer
from imagepipeline.models import (
    Embedding,
    ImageMetadata,
    Recipe,
    VariantSpec,
    VisionAnswer,
    place_variants,
)
from imagepipeline.originals import Original, Originals, build_originals
from imagepipeline.paid_calls import Answer, Kept, PaidCalls
from imagepipeline.providers import build_embedder, build_renderer, build_vision, open_paid_calls
from imagepipeline.services.embedder import Embedder
from imagepipeline.services.vision import VisionModel
from imagepipeline.settings import Settings
from imagepipeline.storage import Storage, open_storage
from imagepipeline.stores.catalogue import Catalogue, read_focus
from imagepipeline.text import hash_text

MAX_ATTEMPTS = 3  # as in a run
A = TypeVar("A", bound=Answer)


@dataclass(frozen=True)
class Picture:
    """One variant: its content, and its similarity to the original if that was compared."""

    name: str
    content: bytes
    similarity: float | None


@dataclass(frozen=True)
class Trial:
    """What one image has and what it would get.

    Attributes:
        image_id: the image.
        causes: why its assets must be made, by asset, of those that must.
        thumbnail: its smallest stored variant; empty if there is none.
        described: its metadata, and those it would get; None where there are none.
        pictures: its variants by name, and those it would get, if they must be made.
        cost_usd: of all calls for it, also of earlier ones whose answers were kept; None if it is
            not known.
        paid_usd: the part of it that this sample has paid, as far as it is known.
        error: why it could not be made; empty if it could.
    """

    image_id: str
    causes: Mapping[str, str]
    thumbnail: bytes = b""
    described: tuple[ImageMetadata | None, ImageMetadata | None] = (None, None)
    pictures: tuple[Sequence[Picture], Sequence[Picture]] = ((), ())
    cost_usd: float | None = 0.0
    paid_usd: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Sample:
    """The trials of some images of a plan, and the number of images in all of it."""

    trials: Sequence[Trial]
    planned: int

    @property
    def cost_usd(self) -> float | None:
        """What the calls for these images cost in US dollars; None if it is not known."""
        costs = [trial.cost_usd for trial in self.trials]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if len(known) == len(costs) else None

    @property
    def paid_usd(self) -> float:
        """What this sample has paid of it in US dollars, as far as it is known."""
        return sum(trial.paid_usd for trial in self.trials)

    @property
    def projected_usd(self) -> float | None:
        """What all of the plan costs in US dollars, the sample included, at its mean cost."""
        made = [trial for trial in self.trials if not trial.error]
        cost_usd = Sample(made, self.planned).cost_usd
        return None if cost_usd is None or not made else cost_usd / len(made) * self.planned


@dataclass
class Bill:
    """The US dollars of an image's calls: of all, None if not known; and of those made now."""

    cost_usd: float | None = 0.0
    paid_usd: float = 0.0

    def add(self, cost_usd: float | None, paid_usd: float | None) -> None:
        """Adds a call; `paid_usd` is None if its answer was kept, or its cost is not known."""
        if self.cost_usd is not None:
            self.cost_usd = None if cost_usd is None else self.cost_usd + cost_usd
        self.paid_usd += paid_usd or 0


@dataclass
class Sampler:
    """Makes what images need as their runs would, but stores nothing except the paid answers.

    These are kept where a run finds them, until it has stored its result.

    Args:
        catalogue: has the results so far.
        files: has the variants so far.
        originals: decodes the images.
        vision: describes them.
        embedder: embeds the descriptions; called only if it is paid for, to know its cost.
        renderer: makes the variants.
        paid_calls: makes the calls, within rate limit and budget.
        recipes: of the assets to make.
        report: receives a line if a call must wait.
    """

    catalogue: Catalogue
    files: Storage
    originals: Originals
    vision: VisionModel
    embedder: Embedder
    renderer: Renderer
    paid_calls: PaidCalls
    recipes: Mapping[str, Recipe]
    report: Callable[[str], None] = lambda line: None
    _asked: list[Kept[Any]] = field(default_factory=list)
    _bill: Bill = field(default_factory=Bill)

    def try_images(self, image_ids: Sequence[str]) -> Iterator[Trial]:
        """Tries one image after the other; one that fails says why.

        Raises:
            PostponedError: paid work is paused, out of budget or behind its rate limit.
        """
        for image_id in image_ids:
            found = self.catalogue.find_causes(image_id, self.recipes)
            trial = Trial(image_id, {asset: cause for asset, cause in found.items() if cause})
            self._bill = Bill()
            try:
                trial = self._try(trial)
            except (RetryableError, PermanentError) as error:
                trial = replace(trial, error=str(error))
            yield replace(trial, cost_usd=self._bill.cost_usd, paid_usd=self._bill.paid_usd)

    def discard(self) -> None:
        """Drops the answers that were asked for, also those that were kept before."""
        for kept in self._asked:
            self.paid_calls.forget(kept)

    def _try(self, trial: Trial) -> Trial:
        row = self.catalogue.get(trial.image_id) or {"variants": []}
        stored = [
            (variant, content)
            for variant in sorted(row["variants"], key=lambda one: (one["width"], one["size"]))
            if not variant["is_alias"] and (content := self._read(variant["path"], variant["size"]))
        ]
        specs = self.renderer.specs_for(read_focus(row.get("focus")))
        before = ImageMetadata.read(row.get("metadata"))
        trial = replace(trial, described=(before, before))
        if stored:
            trial = replace(trial, thumbnail=stored[0][1])
        if trial.causes.keys() & {"metadata", "variants"}:
            path, last_path = row.get("requested_path"), row.get("path")
            with closing(self.originals.look(trial.image_id, path, last_path)) as original:
                if "metadata" in trial.causes:
                    trial = self._describe(trial, original)
                if "variants" in trial.causes:
                    trial = replace(trial, pictures=self._render(original, stored, specs))
        return self._embed(trial)

    def _read(self, path: str, size: int) -> bytes:
        try:
            return self.files.read(path, size)
        except (MissingOriginalError, PermanentError):
            return b""

    def _describe(self, trial: Trial, original: Original) -> Trial:
        recipe, before = self.vision.recipe, trial.described[0]
        known, translate = find_source(
            self.catalogue, self.vision, trial.image_id, original.sha256, trial.causes["metadata"]
        )
        if known:
            return replace(trial, described=(before, known))
        prepared = original.prepared
        describe = partial(self.vision.describe, prepared.preview, prepared.facts)
        answer = self._ask(
            "metadata",
            recipe,
            lambda: self._call(translate or describe),
            Kept("metadata", recipe, original.sha256, VisionAnswer),
        )
        after = with_visible_colors(answer.metadata, prepared.facts)
        return replace(trial, described=(before, after))

    def _call(self, ask: Callable[[], VisionAnswer]) -> VisionAnswer:
        """Asks the model, again if it must do without a parameter; runs do so as attempts."""
        for _ in range(MAX_ATTEMPTS - 1):
            with suppress(FormatRefusedError):
                return ask()
        return ask()

    def _render(
        self,
        original: Original,
        stored: Sequence[tuple[Mapping[str, Any], bytes]],
        specs: Sequence[VariantSpec],
    ) -> tuple[Sequence[Picture], Sequence[Picture]]:
        made, _ = self.renderer.render(original.session, original.facts, specs)
        size = original.facts.width, original.facts.height
        placed = place_variants(specs, *size, original.facts.path)
        by_place = {placed[variant.spec.id]: variant for variant in reversed(made)}
        after = [(path, one.content, one.spec) for path, one in reversed(by_place.items())]
        by_path = {path: spec for path, _, spec in after}
        before = []
        for row, content in stored:
            spec = by_path.get(row["path"])
            # What shows another part of the original cannot be compared.
            is_same = spec is not None and spec.is_possible((row["width"], row["height"]), size)
            before.append((row["path"], content, spec if is_same else None))
        return self._inspect(original, before), self._inspect(original, after)

    def _inspect(
        self, original: Original, variants: Sequence[tuple[str, bytes, VariantSpec | None]]
    ) -> Sequence[Picture]:
        found = self.renderer.inspect(
            original.session,
            original.facts,
            [content for _, content, _ in variants],
            [spec for _, _, spec in variants],
        )
        return [
            Picture(path, content, one.similarity)
            for (path, content, _), one in zip(variants, found, strict=True)
        ]

    def _embed(self, trial: Trial) -> Trial:
        """Pays for the embedding if a run would, for its cost; there is nothing to see."""
        recipe, (before, after) = self.recipes.get("embedding"), trial.described
        if recipe is None or recipe.provider == "local" or after is None:
            return trial
        text = after.embedding_text
        is_unchanged = before is not None and before.embedding_text == text
        if is_unchanged and "embedding" not in trial.causes:
            return trial
        if self.catalogue.find_twins("embedding", recipe, hash_text(text), 1):
            return trial
        kept = Kept("embedding", recipe, hash_text(text), Embedding)
        self._ask("embedding", recipe, lambda: self.embedder.embed(text), kept)
        return trial

    def _ask(self, stage: str, recipe: Recipe, call: Callable[[], A], kept: Kept[A]) -> A:
        """The answer; the cost of the call is added to the bill."""
        self._asked.append(kept)
        try:
            answer, receipt = self.paid_calls.make(None, stage, recipe, call, self.report, kept)
        except (RetryableError, PermanentError) as error:
            if usage := getattr(error, "usage", None):  # a refusal is paid for, too
                cost_usd = self.paid_calls.price(recipe.model, usage)
                self._bill.add(cost_usd, cost_usd)
            raise
        if recipe.provider != "local":
            cost_usd = self.paid_calls.price(recipe.model, answer.usage)
            self._bill.add(cost_usd, receipt.cost_usd)
        return answer


@contextmanager
def open_sampler(
    settings: Settings,
    catalogue: Catalogue,
    recipes: Mapping[str, Recipe],
    report: Callable[[str], None],
) -> Iterator[Sampler]:
    """A sampler with the models and limits of these settings."""
    files = open_storage(settings.storage)
    with open_paid_calls(settings) as paid_calls:
        yield Sampler(
            catalogue,
            files,
            build_originals(settings, files),
            build_vision(settings),
            build_embedder(settings),
            build_renderer(settings),
            paid_calls,
            recipes,
            report,
        )
