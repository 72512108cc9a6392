"""Are the docs true? Reference pages, links, and what they say of the code."""

import itertools
import re
from pathlib import Path

import pytest

from imagepipeline.defs.attempts import ANEW_TAG, GENERATION_TAG, MACHINE_TAG
from imagepipeline.defs.batches import LANE_TAG
from imagepipeline.defs.outcomes import REASON_TAG, STATUS_TAG
from imagepipeline.errors import list_reasons, list_rejections
from imagepipeline_tests import reference

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MAX_README_WORDS = 700

SECTION = re.MULTILINE | re.DOTALL
FENCE = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", flags=re.MULTILINE)
CODE = sorted(
    path
    for folder in ("imagepipeline", "imagepipeline_tests", "benchmarks", "deploy")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".yaml", ".sh", ".mjs")
)
PAGE_IN_CODE = re.compile(r"\bdocs/[\w/-]+\.md\b")
# Tags of runs, which look like paths.
TAGS = {ANEW_TAG, GENERATION_TAG, LANE_TAG, MACHINE_TAG, REASON_TAG, STATUS_TAG}
PATH_OF_OURS = re.compile(r"`(imagepipeline(?:_tests)?/[^`\s]*)`")
# As in docs/architecture.md: a path, then names to look for in it.
PATH_WITH_NAMES = re.compile(r"`(imagepipeline/[^`\s]+\.py)`(?: \(|, )(`\w+`(?:, `\w+`)*)\)")


def name_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", reference.build_pages(), ids=lambda page: page.name)
def test_the_reference_is_up_to_date(page):
    is_current = page.exists() and page.read_text() == reference.build_pages()[page]
    assert is_current, f"{name_page(page)} is stale: run `{reference.COMMAND}`"


def test_the_readme_is_short():
    words = len((ROOT / "README.md").read_text().split())
    assert words <= MAX_README_WORDS, "move details to a page in docs/ and link to it"


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_links_resolve(page):
    broken = [link for link in list_links(page) if not resolves(link, page)]
    assert not broken, f"{name_page(page)} links to what does not exist"


def list_links(page: Path) -> list[str]:
    links = LINK.findall(FENCE.sub("", page.read_text()))
    return [link for link in links if not re.match(r"[a-z]+:", link)]


def resolves(link: str, page: Path) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    return target.exists() and (not anchor or anchor in list_anchors(target))


def list_anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = HEADING.findall(FENCE.sub("", page.read_text()))
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_paths_named_in_a_page_exist(page):
    paths = PATH_OF_OURS.findall(page.read_text())
    missing = [path for path in paths if path not in TAGS and not (ROOT / path).exists()]
    assert not missing, f"{name_page(page)} names files that were moved or deleted"


def test_every_failure_reason_is_described_once_and_under_rejected_uploads_if_it_is_one():
    page = (ROOT / "docs" / "failures.md").read_text()
    sections = dict(re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", page, SECTION))
    reasons = {
        title: re.findall(r"^### `(\w+)`$", text, re.MULTILINE) for title, text in sections.items()
    }
    assert sorted(itertools.chain(*reasons.values())) == sorted(list_reasons())
    assert set(reasons["Rejected uploads"]) == list_rejections()
    for title, text in sections.items():
        for mark in ("**Sentence:**", "**Why:**", "**To do:**"):
            assert text.count(mark) == len(reasons[title]), (title, mark)


def test_names_in_the_architecture_exist():
    found = PATH_WITH_NAMES.findall((ROOT / "docs" / "architecture.md").read_text())
    assert len(found) > 20
    missing = [
        (path, name)
        for path, names in found
        for name in re.findall(r"\w+", names)
        if not is_named_in(ROOT / path, name)
    ]
    assert not missing, "correct docs/architecture.md: these names are not in these files"


def is_named_in(path: Path, name: str) -> bool:
    return path.exists() and re.search(rf"\b{name}\b", path.read_text()) is not None


def test_the_glossary_uses_names_of_the_code():
    rows = re.findall(r"^\|.*\|(.*)\|$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`([A-Za-z_]+)`", row)}
    assert len(names) > 40
    source = "\n".join(path.read_text() for path in (ROOT / "imagepipeline").rglob("*.py"))
    missing = sorted(name for name in names if not re.search(rf"\b{name}\b", source))
    assert not missing, "correct docs/glossary.md: the code does not know these names"


def test_pages_named_in_code_exist():
    named = {(path, page) for path in CODE for page in PAGE_IN_CODE.findall(path.read_text())}
    assert named
    missing = [(name_page(path), page) for path, page in named if not (ROOT / page).exists()]
    assert not missing, "correct these files: the pages they name do not exist"
