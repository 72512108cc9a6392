"""Originals as the assets see them: read, hashed and decoded once per run, however many assets need them."""

import hashlib
from dataclasses import dataclass

from imagepipeline.imaging.decoding import Decoded, Rules, decode
from imagepipeline.imaging.preparation import THUMBNAIL_PX, Prepared, prepare
from imagepipeline.imaging.sandbox import Sandbox, Session, Usage
from imagepipeline.imaging.verification import ImpossibleAnswerError, verify_prepared
from imagepipeline.models import OriginalFacts
from imagepipeline.storage import Storage


@dataclass(frozen=True)
class Original:
    """One original: what the catalogue keeps of it, what was read off it and took, and its pixels in a sandbox."""

    facts: OriginalFacts
    prepared: Prepared
    usage: Usage
    session: Session[Decoded]


class Originals:
    """Reads originals from the file store and decodes them in a sandbox, by the rules.

    Holds the last one, so that all assets of a run see the same bytes, also when the file is replaced meanwhile.
    """

    def __init__(self, files: Storage, sandbox: Sandbox, rules: Rules, preview_px: int = 1024) -> None:
        self._preview_px = preview_px
        self._files = files
        self._sandbox = sandbox
        self._rules = rules
        self._held: tuple[str, Original] | None = None

    def load(self, image_id: str, path: str | None) -> Original:
        """The original at `path`, or where that is None, the one file `original/<image_id>.*`.

        Raises:
            PermanentError: it is missing, or no picture we accept; the message is for its uploader.
            SandboxLostError: decoding crashed or took too long by the clock.
        """
        if self._held is None or self._held[0] != image_id or not self._held[1].session.is_open:
            self.close()
            self._held = image_id, self._load(path or self._files.find_original(image_id))
        return self._held[1]

    def close(self) -> None:
        """Ends the sandbox of the one held."""
        if self._held:
            self._held[1].session.close()
            self._held = None

    def _load(self, path: str) -> Original:
        content = self._files.read(path, self._rules.max_bytes)
        session = self._sandbox.open(decode, content, self._rules)
        try:
            prepared, _ = session.call(prepare, self._preview_px)
            verify_prepared(prepared, self._rules, max(self._preview_px, THUMBNAIL_PX))
        except ImpossibleAnswerError as error:
            session.distrust(str(error))
        except BaseException:
            session.close()
            raise
        facts = OriginalFacts(
            path,
            len(content),
            hashlib.sha256(content).hexdigest(),
            prepared.facts.width,
            prepared.facts.height,
            prepared.placeholder,
            prepared.facts.colors[0][1],
            prepared.flaw,
        )
        return Original(facts, prepared, session.usage, session)
