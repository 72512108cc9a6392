"""The code passes its checks: part of the tests, so that one command runs everything."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
def test_the_code_passes_its_checks(command):
    result = subprocess.run(
        [TOOLS / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_ci_runs_what_the_readme_tells_to_run():
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"^make demo\b", readme, flags=re.MULTILINE)
    assert re.search(r"^make test\b", readme, flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    [recipe] = re.findall(r"^test:.*\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)
    lines = [line.lstrip("\t@") for line in recipe.splitlines()]
    [line] = re.findall(r"^python3 .*$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert lines == [line]


def test_every_imported_package_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    imported = set()
    for path in (ROOT / "imagepipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    providers = packages_distributions()
    for name in imported - sys.stdlib_module_names - {"imagepipeline"}:
        assert declared & set(map(canonicalize_name, providers[name])), name


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_pins_have_hashes_and_no_addresses(name):
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert "index-url" not in text
    pins = re.findall(r"^[a-z0-9].*$", text, flags=re.MULTILINE)
    assert len(pins) > 90
    assert all("==" in pin for pin in pins)
    assert text.count("--hash=sha256:") >= len(pins)


def test_the_package_ships_the_files_of_the_top_level():
    for name in ("dagster.yaml", "workspace.yaml"):
        assert (ROOT / "imagepipeline" / "runtime" / name).read_text() == (ROOT / name).read_text()
