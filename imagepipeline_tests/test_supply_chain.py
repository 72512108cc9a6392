"""Dependencies are listed in a bill of materials and audited for vulnerabilities."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.stack

ROOT = Path(__file__).parent.parent


def test_the_bill_of_materials_lists_all_dependencies(tmp_path):
    bill = tmp_path / "sbom.json"
    command = ["-m", "cyclonedx_py", "requirements", "requirements.txt", "--output-file", str(bill)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    named = {(part["name"], part["version"]) for part in json.loads(bill.read_text())["components"]}
    pins = re.findall(
        r"^([a-z0-9.-]+)(?:\[[a-z,]+\])?==([^ \\]+)",
        (ROOT / "requirements.txt").read_text(),
        re.MULTILINE,
    )
    assert len(pins) > 90
    assert named == set(pins)


def test_no_dependency_has_a_known_vulnerability():
    command = [
        "-m",
        "pip_audit",
        "-r",
        "requirements.txt",
        "--require-hashes",
        "--disable-pip",
        "--format",
        "json",
    ]
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if not result.stdout:
        pytest.skip(f"the audit could not run: {result.stderr.strip()[-200:]}")
    audited = [
        part for part in json.loads(result.stdout)["dependencies"] if "skip_reason" not in part
    ]
    if not audited:
        pytest.skip("this package index has no data on vulnerabilities")
    assert [(part["name"], flaw["id"]) for part in audited for flaw in part["vulns"]] == []


def test_the_image_is_built_from_all_files_the_package_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {"pyproject.toml", project["readme"], *project["license-files"]}
    copied = re.findall(r"^COPY (.*) \./$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert needed <= set(" ".join(copied).split())
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in needed} <= set(allowed)
