"""Takes the screenshots in docs/images.

python -m imagepipeline_tests.end_to_end.screenshots
"""

from pathlib import Path

from imagepipeline_tests.end_to_end import stories, ui

FOLDER = Path(__file__).parents[2] / "docs" / "images"
GOOD = 41


def main() -> None:
    """Starts a stack with fifty uploads and goes through the stories."""
    with ui.running_stack() as stack:
        for name, content in ui.make_uploads(GOOD).items():
            stack.push(name, content)
        stack.wait_for(completed=GOOD, failed=ui.BAD)
        take(stack.url, FOLDER)


def take(url: str, folder: Path) -> None:
    """Takes all screenshots of a stack that has processed the uploads."""
    with ui.open_ui(url, folder) as browser:
        stories.find_red(browser)
        browser.shoot("lineage")
        stories.find_failures(browser)
        browser.shoot("failures")
        browser.start()
        browser.click_link("Catalog")
        browser.page.get_by_text("Materialized").first.wait_for()
        browser.shoot("catalog")
        stories.find_image(browser, "photo-01")
        browser.shoot("partition")


if __name__ == "__main__":
    main()
