"""Push a photo from Python, as an upload service does: store the original, then push its ID.

    imagepipeline up                                          # in another terminal
    python examples/push.py PHOTO [REDIS_URL] [STORAGE_ROOT]  # prints the image's ID

`imagepipeline up` prints where both are; for a socket, REDIS_URL is `unix://` and its path. This
needs the package `redis` only.
"""

import shutil
import sys
import uuid
from pathlib import Path

import redis

SOCKET = Path(".imagepipeline/sockets/valkey.sock").absolute()  # in a URL it must be absolute


def push(
    photo: Path,
    redis_url: str = f"unix://{SOCKET}",
    storage_root: str = ".imagepipeline/storage",
) -> str:
    """Store the photo as an original and push it; returns the ID it is given."""
    image_id = str(uuid.uuid4())
    original = Path(storage_root, "original", image_id).with_suffix(photo.suffix)
    original.parent.mkdir(parents=True, exist_ok=True)
    # A rename within one file system is atomic: no run ever reads half a file.
    part = original.with_name(f".{image_id}.part")
    shutil.copyfile(photo, part)
    part.rename(original)
    redis.Redis.from_url(redis_url).lpush("image-processing:wait", image_id)
    return image_id


if __name__ == "__main__":
    print(push(Path(sys.argv[1]), *sys.argv[2:]))
