"""Opens a storage root, which is a folder or a bucket."""

from pathlib import Path

from imagepipeline.stores.files import FileStore
from imagepipeline.stores.objects import ObjectStore

Storage = FileStore | ObjectStore


def open_storage(root: str) -> Storage:
    """Returns the store at a folder or a `file://`, `s3://`, `gs://` or `az://` URL.

    The store connects when it is first used.
    """
    if "://" in root and not root.startswith("file://"):
        return ObjectStore(root)
    return FileStore(Path(root.removeprefix("file://")))
