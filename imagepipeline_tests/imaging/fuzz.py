"""Decodes thousands of damaged files, to find some that crash, hang or use too much memory.

    python -m imagepipeline_tests.imaging.fuzz --cases 10000 [--seed 1] [--keep FOLDER]

The fuzzer mutates real files of every format: it flips bits, deletes, repeats or zeroes parts,
replaces them by noise or by parts of other files, and writes edge cases where headers may have
lengths and sizes. Each file is decoded and rendered like an upload. Files that crash a child are
kept in FOLDER. The exit code is 1 if a file ended unexpectedly, or took more than 10 s or 512 MB.
"""

import hashlib
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from imagepipeline_tests.imaging.odd_files import (
    SAMPLES,
    Result,
    encode,
    photo_as,
    picture,
    process,
    wide_profile,
)

MAX_SECONDS, MAX_BYTES = 10, 512_000_000
NUMBERS = [
    bytes.fromhex(digits)
    for digits in ("0000", "ffff", "7fff", "00000000", "ffffffff", "7fffffff", "00010000")
]


def seeds() -> list[bytes]:
    """Returns intact files of every format, with profiles, texts, alpha, frames and detail."""
    exif = Image.Exif()
    exif[0x0110] = "Spy 3000"
    exif.get_ifd(0x8825)[1] = "N"
    others = [Image.new("RGB", (96, 64), color) for color in ("black", "white")]
    files = [photo_as(format_) for format_ in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP")]
    files += [
        photo_as("TIFF", compression=compression)
        for compression in ("raw", "tiff_lzw", "jpeg", "tiff_deflate")
    ]
    files += [photo_as("JPEG", progressive=True), photo_as("WEBP", lossless=True)]
    files += [encode(picture("RGBA"), format_) for format_ in ("PNG", "WEBP", "AVIF", "TIFF")]
    files += [
        encode(picture(), format_, exif=exif, icc_profile=wide_profile())
        for format_ in ("JPEG", "PNG", "AVIF")
    ]
    files += [
        encode(picture(), format_, save_all=True, append_images=others)
        for format_ in ("GIF", "PNG", "WEBP", "MPO")
    ]
    files += [
        encode(picture("CMYK"), "JPEG"),
        encode(picture("P"), "GIF"),
        encode(picture("1"), "TIFF", compression="group4"),
    ]
    return files + [path.read_bytes() for path in sorted(SAMPLES.glob("*.heic"))]


def mutate(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Makes one to eight changes, most of them near the start, where the headers are."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        if not data:
            break
        at = int(len(data) * rng.random() ** rng.choice((1, 2, 4)))
        length = rng.randint(1, max(1, min(len(data) - at, rng.choice((4, 64, 2048)))))
        kind = rng.randrange(8)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length] * rng.randint(1, 9)
        elif kind == 4:
            data[at : at + length] = bytes(length)
        elif kind == 5:
            number = rng.choice(NUMBERS)
            data[at : at + len(number)] = number
        elif kind == 6:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            data[at : at + length] = other[start : start + length]
        else:
            del data[at:]
    return bytes(data)


def fuzz(case_count: int, seed: int) -> Iterator[tuple[bytes, Result, float]]:
    """Yields each mutated file, its result, and the elapsed seconds."""
    rng, files = random.Random(seed), seeds()
    for _ in range(case_count):
        content = mutate(rng.choice(files), files, rng)
        started = time.monotonic()
        result = process(content)
        yield content, result, time.monotonic() - started


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.option("--cases", "case_count", default=10_000, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to keep files that crash a child.",
)
def main(case_count: int, seed: int, keep: Path | None) -> None:
    counts: Counter[str] = Counter()
    slowest, largest = 0.0, 0
    examples: dict[str, str] = {}
    for content, result, seconds in track(
        fuzz(case_count, seed), "fuzzing", total=case_count, console=Console(stderr=True)
    ):
        counts[result.outcome] += 1
        examples.setdefault(result.outcome, result.sentence)
        slowest, largest = max(slowest, seconds), max(largest, result.peak_bytes)
        if keep and result.outcome in ("crashed", "unexpected", "distrusted"):
            keep.mkdir(parents=True, exist_ok=True)
            (keep / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)
    table = Table("outcome", "files", "an example")
    for outcome, count in counts.most_common():
        table.add_row(outcome, str(count), examples[outcome][:100])
    out = Console(width=160)
    out.print(table)
    out.print(
        f"{case_count} files, slowest {slowest:.2f} s, largest process {largest / 1e6:.0f} MB"
    )
    is_bounded = slowest <= MAX_SECONDS and largest <= MAX_BYTES
    raise SystemExit(not is_bounded or bool(counts["unexpected"] + counts["distrusted"]))


if __name__ == "__main__":
    main()
