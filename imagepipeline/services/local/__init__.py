"""Two small neural networks that run offline; their weights come from packages."""

import hashlib
from pathlib import Path

from imagepipeline.errors import SettingsError


def read_verified(path: Path, sha256: str) -> bytes:
    """Returns the content of a weights file.

    Raises:
        SettingsError: Its SHA-256 hash is not the expected one.
    """
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SettingsError(
            f"{path.name} does not have the expected SHA-256 hash: reinstall its package"
        )
    return content
