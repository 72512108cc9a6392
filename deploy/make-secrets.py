#!/usr/bin/env python3
"""Makes the secrets of docker-compose.yml, each a random one in a file of its own, in `deploy/secrets`.

    python3 deploy/make-secrets.py [FOLDER]

Needs nothing but Python. What is there already stays, so it can be run again; to rotate a secret see
docs/operations.md. The folder is its owner's only; the files in it are readable, because the containers that are
given them run as users of their own. The Redis users' rights are brought up to date.
"""

import hashlib
import secrets
import sys
from pathlib import Path

# `uploader` may only push and see how much waits. `dagster`, which the daemon and the webserver are, may hand runs to
# the workers and cancel them. `pipeline` may also do what our code does, on our keys; its Lua scripts, the rate
# limit's and those of Celery, may do no more than these. None may read other keys, flush or reconfigure: for that
# there is `admin`, whose password no service is given.
ACL = """\
user default off
user admin on #{admin} allkeys allchannels +@all
user uploader on #{uploader} resetkeys ~image-processing:wait resetchannels -@all +lpush +rpush +llen {connection}
user dagster on #{dagster} resetkeys ~image-processing:runs:* resetchannels &image-processing:runs:* -@all {dispatch} \
{connection}
user pipeline on #{pipeline} resetkeys ~image-processing:* resetchannels &image-processing:runs:* -@all +blmove \
+rpush +lrange +lrem +ltrim +incrby +set +del +zadd +pexpire +zcard +zrange +zremrangebyscore +evalsha +script|load \
+time {dispatch} {work} {connection}
"""
# What Celery does where runs are handed over and cancelled, and where they are executed. Workers listen to one pattern
# of channels, which Redis compares as it is written.
DISPATCH = "+lpush +llen +sadd +smembers +multi +exec +publish +get"
WORK = """&image-processing:runs:/0.celery.pidbox +psubscribe +punsubscribe +subscribe +unsubscribe +brpop +rpop \
+hget +hset +hdel +zrem +srem +watch +unwatch +setex +script|exists +zrangebyscore +exists"""
CONNECTION = "+auth +hello +ping +info +select +client|setinfo +client|setname"


def main() -> None:
    """Writes what is missing."""
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

    def draw(name: str) -> str:
        return make(name, secrets.token_urlsafe(24))

    draw("postgres_password")
    draw("ui_password")
    for database in ("catalogue", "dagster"):
        password = draw(f"{database}_database_password")
        make(
            f"{database}_database_url",
            f"postgresql://{database}:{password}@postgres:5432/{database}",
        )
    digests = {}
    for user in ("uploader", "dagster", "pipeline"):
        password = draw(f"redis_{user}_password")
        digests[user] = hashlib.sha256(password.encode()).hexdigest()
        make(f"redis_{user}_url", f"redis://{user}:{password}@redis:6379/0")
    digests["admin"] = hashlib.sha256(draw("redis_admin_password").encode()).hexdigest()
    acl, rights = (
        folder / "redis_users.acl",
        ACL.format(**digests, connection=CONNECTION, dispatch=DISPATCH, work=WORK),
    )
    if (
        acl.exists() and acl.read_text() != rights
    ):  # they change with versions of ours, and with rotated passwords
        acl.write_text(rights)
        print(
            f"changed {acl}, which redis reads when it starts: docker compose up --detach --force-recreate redis"
        )
    make("redis_users.acl", rights.rstrip())
    for name in (
        "openai_api_key",
        "openrouter_api_key",
        "aws_access_key_id",
        "aws_secret_access_key",
    ):
        make(name, "")  # empty: not used
    for name, variable in (
        ("openai", "IMAGEPIPELINE_VISION"),
        ("openrouter", "IMAGEPIPELINE_EMBEDDING"),
    ):
        if (folder / f"{name}_api_key").read_text().strip():
            print(f"{name}_api_key holds a key, which is used only with {variable}=remote in .env")


if __name__ == "__main__":
    main()
