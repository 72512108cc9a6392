"""Plans say what a change of settings needs; applying one does that and nothing else."""

import math
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest

from imagepipeline import planning
from imagepipeline.errors import ApplyBusyError, BatchBusyError, StackError, UnknownCostError
from imagepipeline.filters import Filter
from imagepipeline.models import (
    NO_TENANTS,
    ImageMetadata,
    OriginalFacts,
    PaidCall,
    Recipe,
    TenantSet,
    Upload,
    now_utc,
)
from imagepipeline.planning import Applier
from imagepipeline.stores import plans as stored_plans
from imagepipeline.stores.applies import Applies
from imagepipeline.stores.batches import Batches
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.plans import Outdated, Plans
from imagepipeline.text import hash_text

RECIPES = {
    "metadata": Recipe("openai", "m", "prompt-1"),
    "variants": Recipe("local", "pillow", "640-webp-80"),
    "embedding": Recipe("openrouter", "e"),
}
METADATA = ImageMetadata(
    description="A cat", tags=["cat"], category="animal", dominant_colors=[], mood="calm"
)


@pytest.fixture
def catalogue(catalogue_url):
    with closing(Catalogue(catalogue_url)) as catalogue:
        yield catalogue


@pytest.fixture
def plans(catalogue_url, catalogue):
    return Plans(catalogue_url)


@pytest.fixture
def ledger(catalogue_url, catalogue):
    with closing(Ledger(catalogue_url)) as ledger:
        yield ledger


@pytest.fixture
def process(catalogue):
    """A function that does what a run of a pending image does: what is not current is made."""

    def process(image_id, recipes=RECIPES, sha256="0" * 64):
        generation = catalogue.get(image_id)["generation"]
        claim = catalogue.claim(image_id, generation, f"run-{image_id}")
        facts = OriginalFacts(f"original/{image_id}.jpg", 9, sha256, 3, 2, "data:", "#000000")
        catalogue.save_original(claim, facts)
        made = []
        for asset, recipe in recipes.items():
            if catalogue.find_causes(image_id, {asset: recipe})[asset] is None:
                continue
            made.append(asset)
            if asset == "metadata":
                catalogue.save_metadata(claim, METADATA, recipe, sha256)
            else:
                text = hash_text(METADATA.embedding_text)
                input_sha256 = text if asset == "embedding" else sha256
                catalogue.record_result(claim, asset, recipe, input_sha256)
        assert catalogue.finish(claim) == "completed"
        return made

    return process


@pytest.fixture
def library(catalogue, process):
    """The IDs of five completed images."""
    ids = [f"image-{number}" for number in range(5)]
    catalogue.accept([Upload(image_id) for image_id in ids])
    for image_id in ids:
        process(image_id)
    return ids


def change(asset, recipe):
    return RECIPES | {asset: recipe}


def test_nothing_is_planned_for_what_todays_settings_would_make(plans, library):
    assert plans.count_outdated(RECIPES) == []
    assert plans.list_outdated(RECIPES, "", 9) == []


@pytest.mark.parametrize(
    ("asset", "recipe", "cause"),
    [
        ("metadata", Recipe("openai", "m2", "prompt-1"), "model"),
        ("metadata", Recipe("azure", "m", "prompt-1"), "model"),
        ("metadata", Recipe("openai", "m", "prompt-2"), "settings"),
        ("variants", Recipe("local", "pillow", "640-webp-70"), "settings"),
        ("embedding", Recipe("openrouter", "e2"), "model"),
    ],
)
def test_a_changed_recipe_outdates_its_asset_alone(plans, library, asset, recipe, cause):
    recipes = change(asset, recipe)
    assert plans.count_outdated(recipes) == [Outdated(asset, cause, 5)]
    assert plans.list_outdated(recipes, "", 9) == library
    assert plans.count_images(recipes) == 5
    assert plans.list_outdated(recipes, library[1], 2) == library[2:4]
    others = planning.select_recipes(recipes, [name for name in RECIPES if name != asset])
    assert plans.list_outdated(others, "", 9) == []


def test_images_are_counted_once_whatever_they_need(plans, library, catalogue, process):
    catalogue.accept([Upload(library[0]), Upload(library[1]), Upload("new")])
    catalogue.fail(catalogue.claim(library[0], 2, "run"), "corrupt", "damaged")
    newer = change("metadata", Recipe("openai", "m2", "prompt-1"))
    catalogue.accept([Upload(library[4])])
    process(library[4], newer)
    for recipes in (
        RECIPES,
        newer,
        newer | {"embedding": Recipe("openrouter", "e2")},
        {"variants": Recipe("local", "pillow", "other")},
        change("embedding", Recipe("openrouter", "e2")),
    ):
        found = list(plans.iterate_outdated(recipes))
        assert plans.count_images(recipes) == len(found) == len(set(found))
        assert not {library[0], library[1], "new"}.intersection(found)
    assert plans.count_images(newer) == 2


def test_images_that_wait_are_counted_as_missing_but_none_that_failed(plans, library, catalogue):
    catalogue.accept([Upload("new"), Upload("bad"), Upload(library[0])])
    for image_id, generation in (("bad", 1), (library[0], 2)):
        catalogue.fail(catalogue.claim(image_id, generation, "run"), "corrupt", "damaged")
    missing = [Outdated(asset, "missing", 1) for asset in ("metadata", "variants", "embedding")]
    failed = Filter.parse(["status=failed"])
    found = plans.count_outdated(RECIPES)
    assert plans.leave_out_failed(found, RECIPES) == missing
    found = plans.count_outdated(RECIPES, failed)
    assert plans.leave_out_failed(found, RECIPES, failed) == missing
    assert plans.list_outdated(RECIPES, "", 9) == []  # the queue and `failed retry` make them
    newer = RECIPES | {"metadata": Recipe("local", "newer")}
    assert plans.count_images(newer) == 4
    assert plans.leave_out_failed(plans.count_outdated(newer), newer)[:2] == [
        Outdated("metadata", "missing", 1),
        Outdated("metadata", "model", 4),
    ]


def test_another_original_makes_results_stale_until_they_are_made_of_it(
    plans, library, catalogue, process
):
    catalogue.accept([Upload(library[0])])
    claim = catalogue.claim(library[0], 2, "run")
    facts = OriginalFacts("original/x.jpg", 9, "1" * 64, 3, 2, "data:", "#000000")
    catalogue.save_original(claim, facts)
    assert plans.count_outdated(RECIPES) == [
        Outdated("metadata", "input", 1),
        Outdated("variants", "input", 1),
    ]
    catalogue.hand_back(claim, "its run was stopped")
    assert process(library[0], sha256="1" * 64) == ["metadata", "variants"]
    assert plans.count_outdated(RECIPES) == []


def call(model, tokens_in=None, tokens_out=None, cost_usd=None):
    return PaidCall(
        "x", 1, "metadata", "openai", model, "answered", tokens_in, tokens_out, cost_usd, 2.0, 0.0
    )


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([], (5, None, None, None)),
        ([call("m2", 800, 60, 0.002), call("m2", 1000, 40, 0.004)], (5, 4500, 250, 0.015)),
        ([call("m2", 800, 60)], (5, 4000, 300, 5 * (800 * 2 + 60 * 8) / 1e6)),  # by price
        ([call("other", 800, 60, 0.002)], (5, None, None, None)),
    ],
)
def test_a_plan_says_what_it_takes(plans, library, ledger, calls, expected):
    for one in calls:
        ledger.record(one)
    recipes = change("metadata", Recipe("openai", "m2", "prompt-1"))
    [step] = planning.plan(plans, ledger, recipes, {"m2": (2.0, 8.0)}, "10/minute")
    assert (step.calls, step.tokens_in, step.tokens_out, step.cost_usd) == pytest.approx(expected)
    assert step.minutes == 0.5
    [step] = planning.plan(plans, ledger, recipes, {}, "off")
    assert step.minutes is None


@pytest.mark.parametrize(
    ("limits", "minutes"),
    [
        ("10/minute,2/hour", 150),
        ("2/hour,10/minute", 150),
        ("1/minute,metadata=10/minute", 5),
        ("1/minute,embedding=1/day", 5),
    ],
)
def test_the_slowest_limit_says_how_long_a_plan_takes(plans, library, ledger, limits, minutes):
    recipes = change("metadata", Recipe("openai", "m2", "prompt-1"))
    [step] = planning.plan(plans, ledger, recipes, {}, limits)
    assert step.minutes == minutes


def test_local_results_cost_nothing(plans, library, ledger):
    recipes = change("variants", Recipe("local", "pillow", "other"))
    [step] = planning.plan(plans, ledger, recipes, {}, "10/minute")
    assert (step.images, step.calls, step.cost_usd, step.minutes) == (5, 0, 0, 0)


@pytest.fixture
def applies(catalogue_url, catalogue):
    return Applies(catalogue_url)


@pytest.fixture
def build_applier(applies, plans, catalogue, ledger, catalogue_url):
    """A function that builds what carries out applies of these recipes."""
    batches = Batches(catalogue_url)
    return partial(Applier, applies, plans, catalogue, ledger, batches)


@pytest.fixture
def carry_out(applies, build_applier, catalogue, process, monkeypatch):
    """A function that follows an apply while the stack works.

    Returns the last progress and what was made.
    """
    monkeypatch.setattr(planning, "POLL_SECONDS", 0)

    def carry_out(apply, recipes, process=process):
        applier, made = build_applier(recipes), {}
        for progress in planning.follow(applies, apply):
            last = progress
            applier.feed()
            for image_id in list_waiting(catalogue):
                made[image_id] = process(image_id, recipes)
        return last, made

    return carry_out


def list_waiting(catalogue):
    """The images of the bulk lane, in the order in which runs claim them."""
    rows = [catalogue.get(f"image-{number}") for number in range(5)]
    return [row["id"] for row in rows if row["status"] == "pending"]


def test_applying_a_plan_makes_what_is_outdated_and_nothing_else(
    applies, plans, library, catalogue, carry_out, monkeypatch
):
    monkeypatch.setattr(planning, "MAX_IN_FLIGHT", 2)
    recipes = change("metadata", Recipe("openai", "m2", "prompt-1"))
    last, made = carry_out(applies.start(recipes), recipes)
    assert (last.begun, last.completed, last.failed) == (5, 5, 0)
    assert made == {
        image_id: ["metadata"] for image_id in library
    }  # and no unchanged text is embedded
    assert plans.count_outdated(recipes) == []
    assert [event["event"] for event in catalogue.get("image-0")["history"]].count("planned") == 1
    assert applies.find_open() is None


def test_a_tick_looks_through_some_images_and_the_next_goes_on(
    applies, plans, build_applier, library, catalogue, monkeypatch
):
    monkeypatch.setattr(stored_plans, "LOOKED_THROUGH", 2)
    recipes = change("metadata", Recipe("openai", "m2", "prompt-1"))
    where = Filter.parse([f"id={library[4]}"])
    assert list(plans.iterate_outdated(recipes, where)) == [library[4]]
    applies.start(recipes, where=where)
    applier = build_applier(recipes)
    for _ in range(2):
        assert (applier.feed(), list_waiting(catalogue)) == (None, [])
    assert (applier.feed(), list_waiting(catalogue)) == (None, [library[4]])
    assert "done" in applier.feed()


def test_an_apply_that_is_stopped_is_continued_by_the_next_one(
    applies, build_applier, library, catalogue, carry_out, monkeypatch
):
    monkeypatch.setattr(planning, "MAX_IN_FLIGHT", 2)
    recipes = change("variants", Recipe("local", "pillow", "other"))
    applier = build_applier(recipes)
    steps = planning.follow(applies, applies.start(recipes))
    next(steps)
    applier.feed()
    steps.close()  # Ctrl-C: two images have begun
    assert catalogue.count()["pending"] == 2
    assert (applier.is_busy, applier.feed()) == (False, None)
    _, made = carry_out(applies.start(recipes), recipes)
    assert sorted(made) == library
    assert catalogue.count()["completed"] == 5


def test_the_apply_of_a_command_that_was_killed_ends(catalogue_url, catalogue):
    now = [now_utc()]
    applies = Applies(catalogue_url, lambda: now[0])
    killed = applies.start(RECIPES, lease_seconds=15)
    with pytest.raises(ApplyBusyError, match="an `apply` of another command is under way"):
        applies.start(RECIPES)
    now[0] += timedelta(seconds=14)
    applies.renew(killed.id, 15)
    now[0] += timedelta(seconds=14)
    assert applies.find_open().id == killed.id
    now[0] += timedelta(seconds=2)
    assert applies.find_open() is None
    assert applies.start(RECIPES).id != killed.id
    with pytest.raises(ApplyBusyError, match="an apply of Dagster's UI is under way"):
        applies.start(RECIPES)


def test_an_apply_that_stood_still_ends_if_another_has_begun(catalogue_url, catalogue):
    now = [now_utc()]
    applies = Applies(catalogue_url, lambda: now[0])
    stopped = applies.start(RECIPES, lease_seconds=15)  # Ctrl-Z
    now[0] += timedelta(seconds=20)
    applies.renew(stopped.id, 15)  # nobody else has begun
    assert applies.find_open().id == stopped.id
    now[0] += timedelta(seconds=20)
    other = applies.start(RECIPES, lease_seconds=15)
    with pytest.raises(ApplyBusyError, match="so long that another one began: an `apply` of ano"):
        applies.renew(stopped.id, 15)
    assert applies.get(stopped.id).expires_at < now[0]
    applies.end(stopped.id, planning.STOPPED)
    applies.renew(stopped.id, 15)  # its images may still run
    assert applies.find_open().id == other.id


@pytest.mark.parametrize(
    "budgets",
    [TenantSet(frozenset({"poor"})), TenantSet(frozenset({"rich"}), is_all_but=True)],
)
def test_images_of_a_tenant_without_budget_keep_no_others_waiting(
    applies, build_applier, library, catalogue, carry_out, monkeypatch, budgets
):
    monkeypatch.setattr(planning, "MAX_IN_FLIGHT", 2)
    catalogue.accept([Upload(image_id, None, 0, "poor") for image_id in library[:3]])
    for image_id in library[:3]:
        catalogue.finish(catalogue.claim(image_id, 2, "run"))
    recipes = change("variants", Recipe("local", "pillow", "other"))
    spent = [NO_TENANTS]
    applier = build_applier(recipes, find_spent=lambda: spent[0])
    applies.start(recipes)
    applier.feed()
    assert list_waiting(catalogue) == library[:2]  # the lane is full
    spent[0] = budgets
    applier.feed()
    assert list_waiting(catalogue) == [library[0], library[1], library[3], library[4]]
    for image_id in library[3:]:
        claim = catalogue.claim(image_id, catalogue.get(image_id)["generation"], "run")
        catalogue.fail(claim, "corrupt", "damaged")
    assert "(done)" in applier.feed()
    spent[0] = NO_TENANTS
    _, made = carry_out(applies.start(recipes), recipes)
    assert sorted(made) == library[:3]


def test_no_apply_begins_while_a_batch_asks_the_same_model(library, build_applier, catalogue_url):
    batches, recipes = Batches(catalogue_url), change("metadata", Recipe("openai", "m2"))
    seq = batches.begin("metadata", recipes["metadata"], {"a" * 64: library[0]})
    for assets in (["metadata"], ["variants"], []):  # an image that is begun gets all it needs
        with pytest.raises(BatchBusyError, match="continue with `imagepipeline apply --batch`"):
            build_applier(recipes).start(assets, None, None)
    build_applier(change("metadata", Recipe("openai", "m3"))).start([], 1, None)
    batches.end(seq, "completed")
    assert planning.explain_open_batches(batches, recipes) is None


def test_an_apply_ends_at_its_limit(applies, library, carry_out):
    recipes = change("variants", Recipe("local", "pillow", "other"))
    last, made = carry_out(applies.start(recipes, max_images=3), recipes)
    assert (last.begun, last.completed, sorted(made)) == (3, 3, library[:3])


def test_an_apply_counts_images_that_fail(applies, library, catalogue, carry_out):
    recipes = change("variants", Recipe("local", "pillow", "other"))

    def fail(image_id, recipes):
        generation = catalogue.get(image_id)["generation"]
        catalogue.fail(catalogue.claim(image_id, generation, "run"), "corrupt", "damaged")

    last, _ = carry_out(applies.start(recipes, max_images=2), recipes, fail)
    assert (last.begun, last.completed, last.failed, last.unfinished) == (2, 0, 2, 0)


def test_an_apply_begins_nothing_once_its_budget_is_spent(
    applies, library, catalogue, ledger, process, carry_out
):
    recipes = change("metadata", Recipe("openai", "m2", "prompt-1"))

    def process_paid(image_id, recipes):
        ledger.record(replace(call("m2", 800, 60, 0.01), image_id=image_id))
        ledger.record(call("m2", 800, 60, 1.0))  # for an upload
        return process(image_id, recipes)

    last, made = carry_out(applies.start(recipes, budget_usd=0.02), recipes, process_paid)
    assert (last.begun, len(made)) == (2, 2)
    assert last.spent_usd == pytest.approx(0.02)
    assert catalogue.count()["completed"] == 5


def test_with_a_budget_images_begin_one_by_one_until_one_has_cost_something(
    applies, build_applier, library, catalogue, ledger, process
):
    recipes = change("metadata", Recipe("openai", "m2", "prompt-1"))
    applier = build_applier(recipes)
    applies.start(recipes, budget_usd=1)
    for image_id in library[:2]:  # their answers are kept: they cost nothing
        for _ in range(2):
            applier.feed()
            assert list_waiting(catalogue) == [image_id]
        process(image_id, recipes)
    applier.feed()
    ledger.record(replace(call("m2", 800, 60, 0.01), image_id=library[2]))
    applier.feed()
    assert list_waiting(catalogue) == library[2:]


@pytest.mark.parametrize("prices", [{}, {"m2": (0.0, 0.0), "e": (0.0, 0.0)}])
def test_a_budget_keeps_no_image_waiting_that_costs_nothing(
    applies, build_applier, library, catalogue, process, prices
):
    model = {"metadata": Recipe("openai", "m2")} if prices else {}
    recipes = change("variants", Recipe("local", "pillow", "other")) | model
    catalogue.accept([Upload(library[0])])  # it waits, and needs a call
    applier = build_applier(recipes, prices)
    applies.start(recipes, budget_usd=1)
    applier.feed()
    assert catalogue.count()["pending"] == 5


@pytest.mark.parametrize("budget_usd", [1e308, math.inf])  # earlier versions took these
def test_a_budget_without_end_keeps_no_apply_from_going_on(
    applies, build_applier, library, catalogue, ledger, process, budget_usd
):
    recipes = change("metadata", Recipe("openai", "m2", "prompt-1"))
    applier = build_applier(recipes)
    applies.start(recipes, budget_usd=budget_usd)
    applier.feed()
    ledger.record(replace(call("m2", 800, 60, 0.01), image_id=library[0]))
    process(library[0], recipes)
    applier.feed()
    assert list_waiting(catalogue) == library[1:]


@pytest.mark.parametrize("assets", [["metadata"], ["variants"], []])
def test_a_budget_needs_to_know_what_all_costs_that_its_images_get(
    library, build_applier, plans, ledger, catalogue, assets
):
    def start(prices):
        build_applier(recipes, prices).start(assets, None, 1)

    recipes = change("metadata", Recipe("openai", "m2", "prompt-1"))
    recipes["variants"] = Recipe("local", "pillow", "other")
    catalogue.accept([Upload("new")])  # no apply begins it
    with pytest.raises(UnknownCostError, match="the cost of metadata and embedding is unknown"):
        start({})
    with pytest.raises(UnknownCostError, match="the cost of embedding is unknown"):
        start({"m2": (1.0, 1.0)})
    ledger.record(replace(call("e", 800, 0, 0.002), stage="embedding", provider="openrouter"))
    start({"m2": (1.0, 1.0)})


def test_a_budget_needs_no_price_of_what_no_image_needs(library, build_applier, catalogue):
    recipes = change("variants", Recipe("local", "pillow", "other"))
    catalogue.accept([Upload("new")])
    build_applier(recipes).start([], None, 1)


def test_a_plan_of_some_assets_counts_what_their_images_get_besides(
    plans, library, ledger, process, catalogue
):
    recipes = change("metadata", Recipe("openai", "m2", "prompt-1"))
    recipes["variants"] = Recipe("local", "pillow", "other")
    catalogue.accept([Upload(library[0])])
    process(library[0], recipes | {"metadata": RECIPES["metadata"]})  # needs no variants
    steps = planning.plan(plans, ledger, recipes, {}, "off", assets=["variants"])
    assert [(step.asset, step.images, step.calls) for step in steps] == [
        ("variants", 4, 0),
        ("metadata", 4, 4),
    ]


def test_an_apply_to_a_stack_with_other_settings_stops(applies, library, catalogue, carry_out):
    recipes = change("metadata", Recipe("openai", "m2", "prompt-1"))
    with pytest.raises(StackError, match="the stack runs with other settings than this command"):
        carry_out(applies.start(recipes), RECIPES)
    assert catalogue.count()["completed"] == 5


def test_one_image_is_explained(library, catalogue):
    recipes = change("metadata", Recipe("openai", "m2", "prompt-1"))
    rows = planning.explain_image(catalogue, library[0], recipes)
    assert [(row["asset"], row["cause"]) for row in rows] == [
        ("metadata", "model"),
        ("variants", "current"),
        ("embedding", "current"),
    ]
    assert rows[0]["made_by"] == "openai:m:prompt-1"
    assert rows[0]["today"] == "openai:m2:prompt-1"


def test_a_sample_is_drawn_by_its_seed(plans, library):
    recipes = change("metadata", Recipe("openai", "m2", "prompt-1"))
    drawn = [tuple(plans.draw_outdated(recipes, 2, seed)) for seed in range(30)]
    assert drawn == [tuple(plans.draw_outdated(recipes, 2, seed)) for seed in range(30)]
    assert len(set(drawn)) == 10  # all pairs of five
    assert plans.draw_outdated(recipes, 9, 0) == library
    assert plans.draw_outdated(RECIPES, 9, 0) == []
