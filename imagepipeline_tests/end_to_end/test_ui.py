"""People find in the UI what they look for, in few clicks; only what is broken is red."""

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from imagepipeline.defs.outcomes import REASON_TAG
from imagepipeline.models import ASSETS
from imagepipeline_tests.end_to_end import stories, ui

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def stack() -> Iterator[ui.Stack]:
    """A stack that has processed uploads, nine of them bad."""
    if ui.find_browser() is None:
        pytest.skip("no Chromium is installed: `apt-get install chromium`")
    with ui.running_stack() as stack:
        for name, content in ui.make_uploads().items():
            stack.push(name, content)
        stack.wait_for(completed=ui.GOOD, failed=ui.BAD)
        yield stack


@pytest.fixture
def browser(stack):
    with ui.open_ui(stack.url) as browser:
        yield browser


def test_an_image_and_what_was_made_of_it_are_three_clicks_away(browser):
    shown = stories.find_image(browser, "photo-01")
    assert browser.clicks <= 3
    assert shown["status"] == "completed"
    assert "saved_percent" in shown["variants"]
    assert "photo-01-sm.avif" in shown["variants"]
    assert "Show Markdown" not in "".join(shown.values())
    for name in ("picture", "swatches"):
        picture = browser.page.get_by_alt_text(name)
        assert picture.evaluate("node => node.naturalWidth") > 40
    assert browser.page.get_by_role("link", name="/assets/metadata?view").count()


def test_which_images_failed_and_why_takes_two_clicks(browser):
    runs = stories.find_failures(browser)
    assert browser.clicks <= 2
    assert len(runs) == ui.BAD
    for image_id, reason in (("bad-document", "unsupported"), ("bad-cut", "truncated")):
        [run] = [run for run in runs if f"partition: {image_id}\n" in run]
        assert f"{REASON_TAG}: {reason}\n" in run
        assert "Success" in run
    browser.open("/assets/original?view=partitions&partition=bad-document")
    browser.page.get_by_text("see_embedding").wait_for()
    shown = browser.read_entries()
    assert (shown["status"], shown["reason"]) == ("failed", "unsupported")
    assert shown["error"].startswith("the original is a PDF document")


def test_what_a_change_of_model_outdated_is_made_again_within_five_clicks(browser, stack):
    engine = sa.create_engine(f"sqlite:///{stack.home / 'catalogue.sqlite'}")
    outdate = (
        "UPDATE image_results SET model = 'earlier' WHERE asset = 'embedding' "
        "AND image_id IN ('photo-02', 'photo-03')"
    )
    with engine.begin() as connection:
        assert connection.exec_driver_sql(outdate).rowcount == 2
    stories.redo_outdated(browser)
    assert browser.clicks <= 5
    query = "SELECT count(*) FROM image_results WHERE model = 'earlier'"

    def is_made() -> bool:
        with engine.connect() as connection:
            return connection.exec_driver_sql(query).scalar() == 0

    ui.wait_until(is_made)
    stack.wait_for(completed=ui.GOOD)


def test_nothing_is_red_but_what_an_operator_must_mend(browser, stack):
    assert stories.find_red(browser) == set()
    stack.push_id("ghost")  # without an original
    stack.wait_for(failed=ui.BAD + 1)
    # The run ends a moment after the image; the check of the queue is made every minute.
    ui.wait_until(lambda: stories.find_red(browser) - {"queue"} == set(ASSETS))
    browser.open("/assets/original?view=partitions&partition=ghost")
    browser.page.get_by_text("see_embedding").wait_for()
    shown = browser.read_entries()
    assert shown["reason"] == "missing"
    assert "click Materialize" in shown["next"]
    original = (stack.home / "storage" / "original" / "photo-00.jpg").read_bytes()
    (stack.home / "storage" / "original" / "ghost.jpg").write_bytes(original + b"another")
    stories.retry(browser, "ghost")
    stack.wait_for(completed=ui.GOOD + 1)
    ui.wait_until(lambda: stories.find_red(browser) <= {"queue"})
