"""Originals: read, hashed and decoded at most once in a run, for all its assets."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from imagepipeline.errors import InvalidUploadError, MissingOriginalError, UnsafePathError
from imagepipeline.imaging.decoding import Decoded, Rules, decode
from imagepipeline.imaging.preparation import Prepared, prepare
from imagepipeline.imaging.sandbox import Sandbox, Session, Usage
from imagepipeline.imaging.verification import ImpossibleAnswerError, verify_prepared
from imagepipeline.models import Claim, OriginalFacts, check_original_path
from imagepipeline.settings import Settings
from imagepipeline.storage import Storage
from imagepipeline.stores.catalogue import Catalogue


@dataclass(frozen=True)
class Decoding:
    """A decoded original: its facts for the catalogue, what was prepared, and its pixels.

    `usage` is the CPU time and memory that decoding took.
    """

    facts: OriginalFacts
    prepared: Prepared
    usage: Usage
    session: Session[Decoded]


class Original:
    """An original that was read, and is decoded when anything but its hash is first asked for.

    All but `path` and `sha256` raise what decoding raises:

    Raises:
        PermanentError: it is not accepted; the message is for the uploader.
        SandboxLostError: decoding crashed or timed out.
    """

    def __init__(
        self, path: str, content: bytes, decode_it: Callable[[str, bytes, str], Decoding]
    ) -> None:
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._content = content
        self._decode = decode_it
        self._decoding: Decoding | None = None

    @property
    def is_usable(self) -> bool:
        """Whether it is not decoded yet, or its pixels are still in the sandbox."""
        return self._decoding is None or self._decoding.session.is_open

    @property
    def facts(self) -> OriginalFacts:
        """What the catalogue keeps of it."""
        return self._decoded.facts

    @property
    def prepared(self) -> Prepared:
        """What was read off its pixels, and its small copies."""
        return self._decoded.prepared

    @property
    def usage(self) -> Usage:
        """The CPU time and memory that decoding took."""
        return self._decoded.usage

    @property
    def session(self) -> Session[Decoded]:
        """The sandbox that has its pixels."""
        return self._decoded.session

    @property
    def known_thumbnail(self) -> str | None:
        """Its thumbnail, if it was decoded."""
        return self._decoding.prepared.thumbnail if self._decoding else None

    def close(self) -> None:
        """Ends its sandbox, if it was decoded."""
        if self._decoding:
            self._decoding.session.close()

    @property
    def _decoded(self) -> Decoding:
        if self._decoding is None:
            self._decoding = self._decode(self.path, self._content, self.sha256)
            self._content = b""
        return self._decoding


class Originals:
    """Reads originals from the storage and decodes them in a sandbox.

    It holds each until `release`, so that all assets of a claim use the same bytes, even if the
    file is replaced meanwhile. Threads may share it, as long as each claim is one thread's.

    Args:
        files: where originals are.
        sandbox: where they are decoded.
        rules: what is accepted.
        preview_px: the long side of the JPEG for a remote vision model; None prepares the offline
            model's square instead.
    """

    def __init__(
        self, files: Storage, sandbox: Sandbox, rules: Rules, preview_px: int | None = None
    ) -> None:
        self._preview_px = preview_px
        self._files = files
        self._sandbox = sandbox
        self._rules = rules
        self._held: dict[tuple[str, int], Original] = {}  # by image ID and fence

    def load(self, claim: Claim, catalogue: Catalogue) -> Original:
        """Reads the original at the path that the upload named, or else `original/<image_id>.*`.

        Before reading it, the catalogue checks that it belongs to the image.

        Raises:
            MissingOriginalError: it is missing, or there is more than one.
            PathTakenError: it belongs to another image.
        """
        held = self._held.get(claim.key)
        if held is None or not held.is_usable:
            self.release(claim)
            path = claim.path or self._find(claim.image_id, claim.last_path)
            catalogue.check_path(claim, path)
            content = self._files.read(path, self._rules.max_bytes)
            held = self._held[claim.key] = Original(path, content, self._decode)
        return held

    def release(self, claim: Claim) -> None:
        """Ends the sandbox of a claimed image's original, if it is held."""
        if held := self._held.pop(claim.key, None):
            held.close()

    def find_thumbnail(self, claim: Claim) -> str | None:
        """The thumbnail of a claimed image, if its original is held and was decoded."""
        held = self._held.get(claim.key)
        return held.known_thumbnail if held else None

    def close(self) -> None:
        """Releases all originals."""
        while self._held:
            self._held.popitem()[1].close()

    def _find(self, image_id: str, last_path: str | None) -> str:
        """The path if the upload named none: the image's own file, or where it was last read."""
        found = self._files.find_originals_of(image_id)
        if not found and last_path and not last_path.startswith(f"original/{image_id}."):
            return last_path
        if not found:
            raise MissingOriginalError(f"there is no original/{image_id}.* below the storage root")
        if len(found) > 1:
            names = ", ".join(path.rpartition("/")[2] for path in found)
            raise MissingOriginalError(f"{image_id} has {len(found)} originals ({names}): keep one")
        try:
            return check_original_path(found[0])
        except InvalidUploadError as error:
            raise UnsafePathError(str(error)) from None

    def look(self, image_id: str, named_path: str | None, last_path: str | None) -> Original:
        """Reads an original without a claim, to change nothing; the caller closes it.

        Raises:
            MissingOriginalError: it is missing, or there is more than one.
        """
        path = named_path or self._find(image_id, last_path)
        return Original(path, self._files.read(path, self._rules.max_bytes), self._decode)

    def _decode(self, path: str, content: bytes, sha256: str) -> Decoding:
        session = self._sandbox.open(decode, content, self._rules)
        try:
            prepared, _ = session.call(prepare, self._preview_px)
            verify_prepared(prepared, self._rules, self._preview_px)
        except ImpossibleAnswerError as error:
            session.distrust(str(error))
        except BaseException:
            session.close()
            raise
        facts = OriginalFacts(
            path,
            len(content),
            sha256,
            prepared.facts.width,
            prepared.facts.height,
            prepared.placeholder,
            prepared.facts.colors[0][1],
            prepared.flaw,
        )
        return Decoding(facts, prepared, session.usage, session)


def build_originals(settings: Settings, files: Storage, niceness: int = 0) -> Originals:
    """The reader of originals under these settings; `niceness` as in `Sandbox`."""
    sandbox = Sandbox(
        settings.max_memory_bytes,
        settings.max_cpu_seconds,
        is_confinement_required=settings.require_confinement,
        niceness=niceness,
    )
    rules = Rules(
        max_bytes=settings.max_bytes,
        max_pixels=settings.max_pixels,
        max_side_px=settings.max_side_px,
        max_frames=settings.max_frames,
        max_icc_bytes=settings.max_icc_bytes,
        max_text_bytes=settings.max_text_bytes,
        variants=settings.specs,
        is_animation_kept=settings.animation == "keep",
        is_truncated_accepted=settings.accept_truncated,
    )
    preview_px = settings.vision_long_side_px if settings.has_remote_vision else None
    return Originals(files, sandbox, rules, preview_px)
