#!/usr/bin/env python3
"""Generates the secrets of docker-compose.yml, one file each, in `deploy/secrets`.

    python3 deploy/make-secrets.py [FOLDER]

Needs nothing but Python. Existing secrets stay, so you can run it again; it updates the rights of
the Redis users. To rotate a secret, see docs/operations.md. Only the owner can enter the folder.
The files in it are readable by all, because each container runs as a user of its own.
"""

import hashlib
import secrets
import sys
from pathlib import Path

# `uploader` may only push and see how much waits. `reader`, for apps, may consume events, but not
# add or delete any. `dagster`, for the daemon and the webserver, may
# hand runs to the workers and cancel them. `pipeline` may also do what our code does, on our keys;
# its Lua scripts, for the rate limit and for Celery, have the same rights. None of these may read
# other keys, flush or reconfigure. Only `admin` may, and no service has its password.
ACL = """\
user default off
user admin on #{admin} allkeys allchannels +@all
user uploader on #{uploader} resetkeys ~image-processing:wait resetchannels -@all +lpush +rpush \
+llen {connection}
user reader on #{reader} resetkeys ~image-processing:events resetchannels -@all {consume} \
{connection}
user dagster on #{dagster} resetkeys ~image-processing:runs:* resetchannels \
&image-processing:runs:* -@all {dispatch} {connection}
user pipeline on #{pipeline} resetkeys ~image-processing:* resetchannels &image-processing:runs:* \
-@all +blmove +rpush +lrange +lrem +ltrim +incrby +set +del +zadd +pexpire +zcard +zrange \
+zremrangebyscore +xadd +xrange +xdel +bgrewriteaof +evalsha +script|load +time {dispatch} {work} \
{connection}
"""
# The commands that Celery needs to hand over and cancel runs, and to execute them. Workers
# subscribe to one pattern of channels; Redis compares such a pattern literally.
DISPATCH = "+lpush +llen +sadd +smembers +multi +exec +publish +get"
WORK = """&image-processing:runs:/0.celery.pidbox +psubscribe +punsubscribe +subscribe \
+unsubscribe +brpop +rpop +hget +hset +hdel +zrem +srem +watch +unwatch +setex +script|exists \
+zrangebyscore +exists"""
CONSUME = """+xread +xreadgroup +xrange +xrevrange +xlen +xack +xclaim +xautoclaim +xpending \
+xgroup|create +xgroup|createconsumer +xgroup|delconsumer +xinfo|stream +xinfo|groups \
+xinfo|consumers"""
CONNECTION = "+auth +hello +ping +info +select +client|setinfo +client|setname"


def main() -> None:
    """Generates the missing secrets and updates the rights of the Redis users."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "secrets"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)

    def make(name: str, text: str) -> str:
        path = folder / name
        if not path.exists():
            path.write_text(text + "\n")
            path.chmod(0o644)
            print(f"made {path}")
        return path.read_text().strip()

    def generate(name: str) -> str:
        return make(name, secrets.token_urlsafe(24))

    generate("postgres_password")
    generate("ui_password")
    for database in ("catalogue", "dagster"):
        password = generate(f"{database}_database_password")
        make(
            f"{database}_database_url",
            f"postgresql://{database}:{password}@postgres:5432/{database}",
        )
    password = generate("reader_database_password")
    make(
        "reader_database_url",
        f"postgresql://imagepipeline_reader:{password}@postgres:5432/catalogue",
    )
    digests = {}
    for user in ("uploader", "reader", "dagster", "pipeline"):
        password = generate(f"redis_{user}_password")
        digests[user] = hashlib.sha256(password.encode()).hexdigest()
        make(f"redis_{user}_url", f"redis://{user}:{password}@redis:6379/0")
    digests["admin"] = hashlib.sha256(generate("redis_admin_password").encode()).hexdigest()
    acl = folder / "redis_users.acl"
    rights = ACL.format(
        **digests, connection=CONNECTION, consume=CONSUME, dispatch=DISPATCH, work=WORK
    )
    # Rights change with our versions and with rotated passwords.
    if acl.exists() and acl.read_text() != rights:
        acl.write_text(rights)
        print(
            f"changed {acl}, which redis reads when it starts: run "
            "`docker compose up --detach --force-recreate redis`"
        )
    make("redis_users.acl", rights.rstrip())
    for name in (
        "openai_api_key",
        "openrouter_api_key",
        "aws_access_key_id",
        "aws_secret_access_key",
    ):
        make(name, "")  # an empty key is not used
    for name, variable in (
        ("openai", "IMAGEPIPELINE_VISION"),
        ("openrouter", "IMAGEPIPELINE_EMBEDDING"),
    ):
        if (folder / f"{name}_api_key").read_text().strip():
            print(f"{name}_api_key holds a key, which is used only with {variable}=remote in .env")


if __name__ == "__main__":
    main()
