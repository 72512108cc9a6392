"""What people do in the UI, in as few clicks as promised. Each story begins at the start page."""

import re

from playwright.sync_api import expect

from imagepipeline_tests.end_to_end.ui import ASSETS, Ui, wait_until

DRAWING_MS = 30_000
NODES = '[class*="inimalAssetNodeBox"]'
# A node is gray while its status is unknown, or if partitions are missing.
IS_LOADED = f"""() => [...document.querySelectorAll('{NODES}')].some(node => {{
    const rgb = getComputedStyle(node).borderTopColor.match(/[0-9]+/g).map(Number);
    return Math.max(...rgb) - Math.min(...rgb) > 60;
}})"""
IS_RED = """node => {
    const [red, green, blue] = getComputedStyle(node).borderTopColor.match(/[0-9]+/g).map(Number);
    return red > green + 60 && red > blue + 60;
}"""


def find_image(ui: Ui, image_id: str) -> dict[str, str]:
    """Looks at an image, its picture and its variants; returns what its page shows."""
    ui.start()
    ui.click_link("Catalog")
    ui.click_through(ui.page.locator('a[href="/assets/original?view=partitions"]'))
    ui.page.get_by_placeholder("Filter by name").fill(image_id)
    ui.click(ui.page.get_by_text(image_id, exact=True).first)
    expect(ui.page.get_by_text("see_embedding")).to_be_visible()
    return ui.read_entries()


def find_failures(ui: Ui) -> list[str]:
    """Finds which images failed and why; returns the texts of the listed runs."""
    ui.start()
    ui.click_link("Runs")
    ui.page.get_by_text("imagepipeline/image_status: failed").first.hover()
    ui.click(ui.page.get_by_text("Add tag to filter").first)
    expect(ui.page).to_have_url(re.compile("image_status"))
    rows = ui.page.locator("[data-index]")
    expect(rows.filter(has_text="photo")).to_have_count(0)
    return rows.all_inner_texts()


def retry(ui: Ui, image_id: str) -> None:
    """Has a failed image tried again from its page of `metadata`, as `original` says."""
    ui.open(f"/assets/metadata?view=partitions&partition={image_id}")
    ui.click(ui.page.get_by_role("button", name="Materialize").first)
    ui.click(ui.page.get_by_role("button", name="Launch 1 run"))


def redo_outdated(ui: Ui) -> None:
    """Has everything made again that a change of settings outdated."""
    ui.start()
    ui.click_link("Jobs")
    ui.click_link("apply_plan")
    ui.click(ui.page.get_by_role("tab", name="Launchpad"))
    ui.click(ui.page.get_by_role("button", name="Launch Run"))
    expect(ui.page).to_have_url(re.compile("/runs/"))


def find_red(ui: Ui) -> set[str]:
    """Opens the lineage; returns the assets that are red."""
    nodes = ui.page.locator(NODES)

    def is_drawn() -> bool:
        # The script of the start page goes on to other pages, and may override an early click.
        ui.start()
        ui.click_link("Lineage")
        try:
            expect(nodes).to_have_count(len(ASSETS), timeout=DRAWING_MS)
        except AssertionError:
            return False
        return True

    wait_until(is_drawn)
    ui.page.wait_for_function(IS_LOADED)
    return {node.inner_text().strip() for node in nodes.all() if node.evaluate(IS_RED)}
