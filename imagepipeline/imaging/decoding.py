"""From untrusted bytes to an upright sRGB image without metadata, or an error that says why not.

Call it in a `Sandbox`: a decoder fed with hostile bytes may crash, or ask for more memory than there is.
"""

import warnings
from dataclasses import dataclass

from PIL import Image, PngImagePlugin

from imagepipeline.errors import (
    EmptyOriginalError,
    PermanentError,
    TooLargeError,
)
from imagepipeline.imaging import exif
from imagepipeline.imaging.color import to_srgb
from imagepipeline.imaging.formats import identify
from imagepipeline.imaging.limits import Rules as Rules  # which callers import with `decode`
from imagepipeline.imaging.limits import check_variants
from imagepipeline.imaging.readers import READERS
from imagepipeline.imaging.readers.source import Picture, Source, explain
from imagepipeline.imaging.scaling import resize


@dataclass(frozen=True)
class Decoded:
    """An image ready to be drawn from: upright, sRGB, mode RGB or RGBA, nothing attached.

    `frames` holds one image, or those of an animation, all of one mode, with a duration each; they are at most
    `Rules.max_width_px` wide, while `width` and `height` are the upright original's. `play_count` is how often an
    animation is shown, 0 for ever. `camera`, `taken_on` (YYYY-MM-DD), `artist` and `copyright` are what EXIF said, in
    printable characters. `flaw` says what is missing of a cut-off or damaged file.
    """

    frames: tuple[Image.Image, ...]
    format: str
    width: int
    height: int
    durations_ms: tuple[int, ...] = ()
    play_count: int = 0
    camera: str | None = None
    taken_on: str | None = None
    artist: str | None = None
    copyright: str | None = None
    flaw: str | None = None

    @property
    def image(self) -> Image.Image:
        """The image, or the first frame."""
        return self.frames[0]


DEFAULT_RULES = Rules()


def decode(content: bytes, rules: Rules = DEFAULT_RULES) -> Decoded:
    """Decodes an original in full.

    Raises:
        EmptyOriginalError: of 0 bytes.
        TooLargeError: of more bytes than allowed.
        UnsupportedFormatError: of no accepted format, or of a kind that would not be read rightly.
        LimitError: its header exceeds a limit; told before pixels are decoded.
        TruncatedImageError: the end is missing.
        UnreadableImageError: damaged.
    """
    if not content:
        raise EmptyOriginalError(
            "the original is empty (0 bytes): the upload was cut off or never written"
        )
    if len(content) > rules.max_bytes:
        raise TooLargeError(
            f"the original has more than {rules.max_bytes:,} bytes (IMAGEPIPELINE_MAX_BYTES)"
        )
    format_ = identify(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what decoders say of odd tags
        _bound_texts(rules)
        try:
            return _finish(READERS[format_](content, rules), format_, rules)
        except (PermanentError, MemoryError):
            raise
        except Exception as error:  # decoders raise whatever they stumble over
            raise explain(format_, error) from error


def _bound_texts(rules: Rules) -> None:
    # Pillow's own bounds on what it unpacks of a PNG.
    PngImagePlugin.MAX_TEXT_CHUNK = rules.max_text_bytes
    PngImagePlugin.MAX_TEXT_MEMORY = rules.max_text_bytes
    Image.MAX_IMAGE_PIXELS = None  # our own limits count instead


def _finish(source: Source, format_: str, rules: Rules) -> Decoded:
    orientation, texts = exif.read(source.exif)
    turn = exif.TURNS.get(orientation) if source.is_turned_by_exif else None
    is_on_its_side = turn in (exif.TURNS[5], exif.TURNS[6], exif.TURNS[7], exif.TURNS[8])
    width, height = (
        (source.height, source.width) if is_on_its_side else (source.width, source.height)
    )
    check_variants(width, height, rules)
    frames, durations_ms, flaw = [], [], None
    for picture in source.load(is_on_its_side):
        scale = min(
            1.0,
            rules.max_width_px / (picture.image.height if is_on_its_side else picture.image.width),
        )
        upright = _to_rgb(_scale(picture, scale), source)
        frames.append(_without_attachments(upright if turn is None else upright.transpose(turn)))
        durations_ms.append(picture.duration_ms)
        flaw = flaw or picture.flaw
    if len({frame.mode for frame in frames}) > 1:  # encoders want them alike
        frames = [frame.convert("RGBA") for frame in frames]
    is_animation = len(frames) > 1
    return Decoded(
        frames=tuple(frames),
        format=format_,
        width=width,
        height=height,
        durations_ms=tuple(durations_ms) if is_animation else (),
        play_count=source.count_plays() if is_animation else 0,
        flaw=flaw,
        **texts,
    )


def _scale(picture: Picture, scale: float) -> Image.Image:
    """The picture's image, scaled down before its colours are converted: fewer pixels to convert."""
    image = picture.image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return resize(image, size)


def _to_rgb(image: Image.Image, source: Source) -> Image.Image:
    """RGB, or RGBA if some of it is transparent."""
    alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
    if alpha is not None:
        image = image.convert(image.mode[:-1])
    image = to_srgb(image, source.space)
    if alpha is not None and alpha.getextrema() != (255, 255):
        image.putalpha(alpha)
    return image


def _without_attachments(image: Image.Image) -> Image.Image:
    # Encoders write EXIF, XMP, ICC and comments found here into the variant: GPS would leak.
    image.info = {}
    image.getexif().clear()
    return image
