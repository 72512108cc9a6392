"""What `.ci/run` checks besides behaviour, so that one command is enough."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = Path(sys.executable).parent


@pytest.mark.stack
@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("mypy",),
        ("lint-imports",),
        ("dg", "check", "defs"),
    ],
    ids=" ".join,
)
def test_the_code_keeps_its_rules(command):
    result = subprocess.run(
        [TOOLS / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_ci_runs_the_line_the_readme_gives():
    readme = (ROOT / "README.md").read_text()
    [line] = re.findall(r"^python3 -m venv .*pytest$", readme, flags=re.MULTILINE)
    assert line in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_pins_have_hashes_and_no_addresses(name):
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert "index-url" not in text
    pins = re.findall(r"^[a-z0-9].*$", text, flags=re.MULTILINE)
    assert len(pins) > 90
    assert all("==" in pin for pin in pins)
    assert text.count("--hash=sha256:") >= len(pins)


def test_the_readme_lists_every_setting():
    from imagepipeline.settings import Settings

    readme = (ROOT / "README.md").read_text()
    for field in Settings.model_fields.values():
        assert f"| `{field.alias}` |" in readme, field.alias
        assert field.description in readme, field.alias


def test_the_package_ships_the_files_of_the_top_level():
    for name in ("dagster.yaml", "workspace.yaml"):
        assert (ROOT / "imagepipeline" / "runtime" / name).read_text() == (ROOT / name).read_text()
