"""Renders the variants of an image, the preview for the vision model, and the placeholder."""

import base64
import io
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace

from PIL import ExifTags, Image

from imagepipeline.errors import LimitError
from imagepipeline.imaging.boxes import set_play_count
from imagepipeline.imaging.cropping import find_region
from imagepipeline.imaging.decoding import Decoded
from imagepipeline.imaging.inspection import Inspection, choose_compared, inspect
from imagepipeline.imaging.sandbox import Session, Usage
from imagepipeline.imaging.scaling import fill_clear, put_on_white, resize
from imagepipeline.imaging.verification import (
    ImpossibleAnswerError,
    verify_inspections,
    verify_own_inspections,
    verify_variants,
)
from imagepipeline.models import (
    CLASSIFIER_PX,
    DEFAULT_WIDTHS_PX,
    MAX_SETTINGS_CHARACTERS,
    MAX_THUMBNAIL_CHARACTERS,
    OriginalFacts,
    Recipe,
    Variant,
    VariantSpec,
)
from imagepipeline.output_formats import OUTPUT_FORMATS
from imagepipeline.text import hash_text

CROP_SHARE = 0.875  # of the shorter side, as in the published evaluation of EfficientNet-Lite0
PLACEHOLDER_PX = 16
THUMBNAIL_SIDES_PX = (96, 80, 64, 48, 16)  # the last one always fits


class Renderer:
    """Renders and inspects the variants of decoded originals, by its recipe.

    Args:
        specs: the variants to make.
        is_animated: whether originals come with all their frames; only the recipe needs to know.
        has_rights: whether artist and copyright are kept.
        compared_share: of how many images (0..1) all variants are compared with the original; of
            the others, the smallest variant of each format is.
    """

    def __init__(
        self,
        specs: Sequence[VariantSpec],
        is_animated: bool = False,
        has_rights: bool = False,
        compared_share: float = 1.0,
    ) -> None:
        self.specs = tuple(specs)
        self._compared_share = compared_share
        self._options = _list_options(is_animated, has_rights)
        self.recipe = build_recipe(specs, is_animated, has_rights)
        self._has_rights = has_rights
        # By the bytes of a rendered variant. Threads may render images at the same time.
        self._inspections: weakref.WeakKeyDictionary[Session[Decoded], dict[bytes, Inspection]] = (
            weakref.WeakKeyDictionary()
        )

    def specs_for(self, focus: tuple[float, float] | None) -> tuple[VariantSpec, ...]:
        """The variants of an image whose upload gave that focus."""
        return tuple(spec.at(focus) for spec in self.specs)

    def recipe_of(self, spec: VariantSpec) -> str:
        """What makes one variant, as text; parts of it are separated by commas."""
        return ",".join([spec.recipe, *self._options])

    def begin(
        self, session: Session[Decoded], original: OriginalFacts, specs: Sequence[VariantSpec]
    ) -> None:
        """Starts rendering in the sandbox and returns at once; `render` collects the result."""
        session.begin(render_and_inspect, *self._build_arguments(original, specs))

    def render(
        self, session: Session[Decoded], original: OriginalFacts, specs: Sequence[VariantSpec]
    ) -> tuple[list[Variant], Usage]:
        """These variants of an original, and the CPU time and memory they took.

        Raises:
            UnreadableImageError: what came is not what was asked for.
            ImagePipelineError: what `Session.call` and `render` raise.
        """
        specs, has_rights, compared = self._build_arguments(original, specs)
        made, usage = session.call(render_and_inspect, specs, has_rights, compared)
        variants, inspections = made
        try:
            verify_variants(variants, specs, (original.width, original.height))
            verify_own_inspections(inspections, variants, compared)
        except ImpossibleAnswerError as error:
            session.distrust(str(error))
        known = self._inspections[session] = {}
        # A small original has several variants of the same bytes: what was compared counts for all.
        for position in sorted(range(len(variants)), key=compared.__contains__):
            known[variants[position].content] = inspections[position]
        return variants, usage

    def inspect(
        self,
        session: Session[Decoded],
        original: OriginalFacts,
        contents: Sequence[bytes],
        specs: Sequence[VariantSpec | None],
    ) -> list[Inspection]:
        """Inspects stored variants of the image; raises any error that `Session.call` raises.

        Variants with the same bytes as rendered ones have already been inspected. Others are
        compared as if they had been rendered, but not without a spec.
        """
        known = self._inspections.get(session, {})
        unknown = [position for position, one in enumerate(contents) if one not in known]
        if not unknown:
            return [known[content] for content in contents]
        chosen = self._choose_compared(original, specs)
        compared = [at for at, position in enumerate(unknown) if position in chosen]
        inspections, _ = session.call(
            inspect, [contents[at] for at in unknown], [specs[at] for at in unknown], compared
        )
        try:
            verify_inspections(inspections, compared, len(unknown))
        except ImpossibleAnswerError as error:
            session.distrust(str(error))
        found = dict(zip(unknown, inspections, strict=True))
        return [found.get(at) or known[content] for at, content in enumerate(contents)]

    def _build_arguments(
        self, original: OriginalFacts, specs: Sequence[VariantSpec]
    ) -> tuple[Sequence[VariantSpec], bool, Sequence[int]]:
        return tuple(specs), self._has_rights, self._choose_compared(original, specs)

    def _choose_compared(
        self, original: OriginalFacts, specs: Sequence[VariantSpec | None]
    ) -> list[int]:
        # By the original's hash, so that a repeated attempt asks for the same.
        is_sampled = int(original.original_sha256[:8], 16) < self._compared_share * 2**32
        if is_sampled:
            return [position for position, spec in enumerate(specs) if spec is not None]
        return choose_compared(specs)


def build_recipe(
    specs: Iterable[VariantSpec], is_animated: bool = False, has_rights: bool = False
) -> Recipe:
    """Returns the recipe of all variants together: Pillow, the specs, and what else is kept."""
    text = ",".join([*(spec.recipe for spec in specs), *_list_options(is_animated, has_rights)])
    if len(text) > MAX_SETTINGS_CHARACTERS:
        digest = hash_text(text)[:16]
        text = f"{text[: MAX_SETTINGS_CHARACTERS - len(digest) - 1]}…{digest}"
    return Recipe("local", "pillow", text)


def _list_options(is_animated: bool, has_rights: bool) -> list[str]:
    return ["animated"] * is_animated + ["rights"] * has_rights


def render(
    decoded: Decoded, specs: Iterable[VariantSpec], has_rights: bool = False
) -> list[Variant]:
    """Renders one variant per spec, with all frames of the image if its format is animated.

    Variants are never enlarged, and at least 1 px high. They have no metadata, except for artist
    and copyright if `has_rights`.

    Returns:
        The variants in the order of `specs`.

    Raises:
        LimitError: an encoder failed, which happens when it runs out of memory.
    """
    specs = list(specs)
    options = _animation_options(decoded) | (_rights_options(decoded) if has_rights else {})
    sizes = _Sizes(decoded)
    made: dict[tuple[int, str, int | None], bytes] = {}  # variants of a small original may be equal
    variants = []
    for spec in specs:
        frames = sizes.get(spec)
        key = (id(frames[0]), spec.format, spec.quality)
        if key not in made:
            made[key] = _encode(frames, spec, options)
        variants.append(Variant(spec, *frames[0].size, made[key]))
    return variants


class _Sizes:
    """The frames of an image in the sizes of its variants, each made when it is first needed."""

    def __init__(self, decoded: Decoded) -> None:
        self._decoded = decoded
        self._made: dict[VariantSpec, Sequence[Image.Image]] = {}

    def get(self, spec: VariantSpec) -> Sequence[Image.Image]:
        size = replace(spec, name="", format="", quality=None)
        if size not in self._made:
            self._made[size] = self._scale(size) if size.height_px is None else self._crop(size)
        return self._made[size]

    def _scale(self, size: VariantSpec) -> list[Image.Image]:
        # From the next larger default width, which has far fewer pixels to filter than the
        # original. The difference is not visible, and the same whatever else is rendered.
        larger = [width_px for width_px in DEFAULT_WIDTHS_PX.values() if width_px > size.width_px]
        frames = self._decoded.frames
        if larger:
            frames = tuple(self.get(replace(size, width_px=min(larger))))
        return [resize(frame, size.size_for(*frame.size)) for frame in frames]

    def _crop(self, size: VariantSpec) -> list[Image.Image]:
        region = find_region(self._decoded.image, size)
        target = size.size_for(self._decoded.width, self._decoded.height)
        return [resize(frame.crop(region), target) for frame in self._decoded.frames]


def render_and_inspect(
    decoded: Decoded,
    specs: Sequence[VariantSpec],
    has_rights: bool,
    compared: Sequence[int] | None = None,
) -> tuple[list[Variant], list[Inspection]]:
    """The variants and their inspections, of which `compared` as in `inspect`.

    Raises what `render` raises.
    """
    variants = render(decoded, specs, has_rights)
    contents = [variant.content for variant in variants]
    return variants, inspect(decoded, contents, specs, compared)


def render_preview(image: Image.Image, long_side_px: int = 1024) -> bytes:
    """Renders a JPEG for the vision model, on white, without metadata.

    It is at most `long_side_px` pixels long, to use fewer tokens.
    """
    buffer = io.BytesIO()
    put_on_white(shrink(image, long_side_px)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def render_square(image: Image.Image) -> bytes:
    """Renders the central square as raw RGB [224, 224, 3] for the offline vision model.

    So the model, which runs outside the sandbox, decodes nothing.
    """
    side = int(CROP_SHARE * min(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    size = (CLASSIFIER_PX, CLASSIFIER_PX)
    return put_on_white(image).resize(size, Image.Resampling.BICUBIC, box=box).tobytes()


def shrink(image: Image.Image, long_side_px: int) -> Image.Image:
    """The image with at most that long side."""
    scale = min(1, long_side_px / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return resize(image, size)


def render_placeholder(image: Image.Image) -> str:
    """Renders a WebP of at most 16 px for a page to show until the image has loaded.

    Returns:
        A data URI of about a hundred characters.
    """
    small = image.copy()
    small.thumbnail((PLACEHOLDER_PX, PLACEHOLDER_PX), Image.Resampling.BOX)
    return _encode_data_uri(small, quality=50, method=6)


def render_thumbnail(image: Image.Image) -> str:
    """Renders the largest of a few small WebPs that the UI shows without a click.

    Returns:
        A data URI of at most `MAX_THUMBNAIL_CHARACTERS`.
    """
    uri = ""
    for long_side_px in THUMBNAIL_SIDES_PX:
        image = shrink(image, long_side_px)
        uri = _encode_data_uri(image, quality=20, method=4)
        if len(uri) <= MAX_THUMBNAIL_CHARACTERS:
            break
    return uri


def _encode_data_uri(image: Image.Image, quality: int, method: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "webp", quality=quality, method=method)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _animation_options(decoded: Decoded) -> dict[str, object]:
    if len(decoded.frames) == 1:
        return {}
    return {"save_all": True, "duration": list(decoded.durations_ms), "loop": decoded.play_count}


def _rights_options(decoded: Decoded) -> dict[str, object]:
    exif = Image.Exif()
    if decoded.artist:
        exif[ExifTags.Base.Artist] = decoded.artist
    if decoded.copyright:
        exif[ExifTags.Base.Copyright] = decoded.copyright
    return {"exif": exif.tobytes()} if len(exif) else {}


def _encode(frames: Sequence[Image.Image], spec: VariantSpec, options: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    format_ = OUTPUT_FORMATS[spec.format]
    if not format_.is_animated:
        frames = frames[:1]
        options = {name: value for name, value in options.items() if name == "exif"}
    if not format_.has_alpha:
        frames = [put_on_white(frame) for frame in frames]
    elif spec.format == "avif":  # WebP's encoder flattens them itself
        frames = fill_clear(frames)
    if len(frames) > 1:
        options = options | {"append_images": list(frames[1:])}
    if spec.quality is not None:
        options = options | {"quality": spec.quality}
    try:
        frames[0].save(buffer, format_.encoder, **format_.encoder_options, **options)
    except (OSError, RuntimeError, ValueError) as error:
        size = f"{len(frames)} x {frames[0].width} x {frames[0].height} px"
        limit = f"the memory allowed (IMAGEPIPELINE_MAX_MEMORY_BYTES): {error}"
        raise LimitError(f"{size} cannot be encoded as {spec.format} in {limit}") from error
    if spec.format == "avif" and isinstance(plays := options.get("loop"), int):
        return set_play_count(buffer.getvalue(), plays)  # Pillow's plugin cannot set it
    return buffer.getvalue()
