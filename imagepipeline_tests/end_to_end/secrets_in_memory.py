"""Looks for secrets in the environment and the memory of each process of a running stack."""

from pathlib import Path

from imagepipeline_tests.end_to_end.processes import list_tree

SECRETS = {
    "OPENAI_API_KEY": "canary-of-the-provider",
    "OPENROUTER_API_KEY": "canary-of-the-embedder",
    "AWS_SECRET_ACCESS_KEY": "canary-of-the-bucket",
    "IMAGEPIPELINE_WEBHOOK_SECRET": "canary-of-the-webhook",
    "SOME_OTHER_TOKEN": "canary-of-another-project",
}
PROVIDERS, BUCKET, WEBHOOK = (
    {"OPENAI_API_KEY", "OPENROUTER_API_KEY"},
    {"AWS_SECRET_ACCESS_KEY"},
    {"IMAGEPIPELINE_WEBHOOK_SECRET"},
)
ALLOWED = {
    "worker": PROVIDERS | BUCKET,
    "run": PROVIDERS | BUCKET,
    "resident": BUCKET,
    "code-server": WEBHOOK,
    "daemon": set(),
    "webserver": set(),
    "forkserver": set(),
    "zygote": set(),
    "valkey": set(),
}


def read_memory(pid):
    """Returns the writable memory of a process, and its initial environment."""
    chunks = [Path(f"/proc/{pid}/environ").read_bytes()]
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            area, rights, *_, name = (
                [*line.split(maxsplit=5), ""][:6] if len(line.split()) > 5 else [*line.split(), ""]
            )
            if not rights.startswith("rw") or name.startswith("[v"):
                continue
            start, end = (int(number, 16) for number in area.split("-"))
            memory.seek(start)
            try:
                chunks.append(memory.read(end - start))
            except OSError:  # unmapped in the meantime
                continue
    return b"".join(chunks)


def name_process(path):
    line = (path / "cmdline").read_bytes().decode()
    comm = (path / "comm").read_text().strip()
    words = ("zygote", "imagepipeline.resident", "valkey")
    word = next((word for word in words if word in line), None)
    return (
        word.removeprefix("imagepipeline.")
        if word
        else "forkserver"
        if comm.startswith("python")
        else comm
    )


def check_secrets(supervisor: int) -> None:
    """Checks that each process below a supervisor holds its own secrets and no others.

    The supervisor's environment must contain `SECRETS`.
    """
    told = set()
    for pid in list_tree(supervisor)[1:]:
        path = Path(f"/proc/{pid}")
        name = name_process(path)
        memory = read_memory(pid)
        held = {secret for secret, value in SECRETS.items() if value.encode() in memory}
        if "resource_tracker" in (path / "cmdline").read_text():
            assert not held
            continue
        assert held <= ALLOWED[name], (name, held - ALLOWED[name])
        assert held or not ALLOWED[name], f"{name} lacks its secrets, or its memory was not read"
        told.add(name)
    assert told == set(ALLOWED)
