"""Turns untrusted bytes into an upright sRGB image without metadata, or an error with a reason.

Call it in a `Sandbox`: hostile bytes may crash a decoder, or make it use up all memory.
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
from imagepipeline.imaging.limits import Rules as Rules  # re-exported for callers of `decode`
from imagepipeline.imaging.limits import check_variants, find_scale
from imagepipeline.imaging.readers import READERS
from imagepipeline.imaging.readers.source import Source, explain
from imagepipeline.imaging.scaling import resize


@dataclass(frozen=True)
class Decoded:
    """A decoded original: upright, in sRGB, without metadata in the images.

    Attributes:
        frames: one image, or the frames of a kept animation, all in mode RGB or all in RGBA; no
            larger than `Rules.max_width_px` and `Rules.variants` need.
        format: format of the file.
        width: pixels of the upright original.
        height: pixels of the upright original.
        durations_ms: duration of each frame; empty if there is one frame.
        play_count: how often an animation is shown, 0 for ever.
        camera: model, from EXIF; this text and the following are printable.
        taken_on: date from EXIF, as YYYY-MM-DD.
        artist: from EXIF.
        copyright: from EXIF.
        flaw: what is missing of a truncated or damaged file; None if nothing is.
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
        """The image, or the first frame of an animation."""
        return self.frames[0]


DEFAULT_RULES = Rules()


def decode(content: bytes, rules: Rules = DEFAULT_RULES) -> Decoded:
    """Decodes an original in full.

    Raises:
        EmptyOriginalError: it has 0 bytes.
        TooLargeError: it has more bytes than allowed.
        UnsupportedFormatError: the format is not accepted, or this kind of it cannot be decoded
            correctly.
        LimitError: the header exceeds a limit; checked before pixels are decoded.
        TruncatedImageError: the end of the file is missing.
        UnreadableImageError: the file is damaged.
        MemoryError: a decoder needed too much memory.
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
        warnings.simplefilter("ignore")  # warnings of decoders about odd tags
        _set_pillow_limits(rules)
        try:
            return _finish(READERS[format_](content, rules), format_, rules)
        except (PermanentError, MemoryError):
            raise
        except Exception as error:  # decoders raise errors of any type
            raise explain(format_, error) from error


def _set_pillow_limits(rules: Rules) -> None:
    PngImagePlugin.MAX_TEXT_CHUNK = rules.max_text_bytes
    PngImagePlugin.MAX_TEXT_MEMORY = rules.max_text_bytes
    Image.MAX_IMAGE_PIXELS = None  # we check our own limit


def _finish(source: Source, format_: str, rules: Rules) -> Decoded:
    turn = exif.TURNS.get(source.orientation)
    is_on_its_side = turn in (exif.TURNS[5], exif.TURNS[6], exif.TURNS[7], exif.TURNS[8])
    width, height = (
        (source.height, source.width) if is_on_its_side else (source.width, source.height)
    )
    check_variants(width, height, rules)
    scale = find_scale(width, height, rules)
    size = max(1, round(source.width * scale)), max(1, round(source.height * scale))
    frames, durations_ms, flaw = [], [], None
    for picture in source.load(is_on_its_side):
        # Before the colours are converted, as fewer pixels are left then.
        upright = _to_rgb(resize(picture.image, size, picture.extent), source)
        frames.append(_without_attachments(upright if turn is None else upright.transpose(turn)))
        durations_ms.append(picture.duration_ms)
        flaw = flaw or picture.flaw
    if len({frame.mode for frame in frames}) > 1:  # encoders need frames of the same mode
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
        **exif.read_texts(source.exif),
    )


def _to_rgb(image: Image.Image, source: Source) -> Image.Image:
    """Converts an image to RGB, or to RGBA if any pixel is transparent."""
    alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
    if alpha is not None:
        image = image.convert(image.mode[:-1])
    image = to_srgb(image, source.space)
    if alpha is not None and alpha.getextrema() != (255, 255):
        image.putalpha(alpha)
    return image


def _without_attachments(image: Image.Image) -> Image.Image:
    # Encoders would copy EXIF, XMP, ICC profiles and comments from here into the variants, and so
    # leak the GPS position.
    image.info = {}
    image.getexif().clear()
    return image
