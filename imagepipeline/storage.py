"""The store a storage root names: a folder, or a bucket."""

from pathlib import Path

from imagepipeline.stores.files import FileStore
from imagepipeline.stores.objects import ObjectStore

Storage = FileStore | ObjectStore


def open_storage(root: str) -> Storage:
    """The store at a folder, or at a `file://`, `s3://`, `gs://` or `az://` URL; it connects when first used."""
    if "://" in root and not root.startswith("file://"):
        return ObjectStore(root)
    return FileStore(Path(root.removeprefix("file://")))
