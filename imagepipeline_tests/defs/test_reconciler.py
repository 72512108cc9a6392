"""What a crash leaves behind is repaired, once, and only what is really lost."""

import dagster as dg
import pytest

from imagepipeline.defs.reconciler import (
    RENEWAL_WAITS_SECONDS,
    STALL_SECONDS,
    UNCLAIMED_SECONDS,
    StandstillWatch,
    reconcile,
    reconciler,
)
from imagepipeline.models import Upload


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def look(catalogue, instance, tasks, clock):
    watch = StandstillWatch(clock)

    def look(after_seconds=0):
        clock.now += after_seconds
        return reconcile(catalogue, instance, tasks, watch)

    return look


def lose(catalogue, image_id, run):
    """An image whose run is as given."""
    catalogue.accept([Upload(image_id)])
    generation = catalogue.get(image_id)["generation"]
    return catalogue.claim(image_id, generation, run.run_id)


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS])
def test_an_image_whose_run_has_ended_waits_again(look, catalogue, start_run, status):
    lose(catalogue, "a", start_run("a", status=status))
    [line] = look()
    assert "a was recovered" in line
    row = catalogue.get("a")
    assert (row["status"], row["generation"]) == ("pending", 2)
    assert [event["event"] for event in row["history"]] == [
        "accepted",
        "claimed",
        "recovered",
        "handed_back",
    ]
    assert look() == []


def test_an_image_whose_run_was_deleted_waits_again(look, catalogue, start_run, instance):
    run = start_run("a")
    lose(catalogue, "a", run)
    instance.delete_run(run.run_id)
    look()
    assert catalogue.get("a")["status"] == "pending"


def test_a_run_that_beats_is_left_alone_however_long_it_takes(look, catalogue, start_run):
    claim = lose(catalogue, "a", start_run("a"))
    for _ in range(20):
        assert look(after_seconds=STALL_SECONDS - 1) == []
        catalogue.beat(claim)


def test_a_run_that_stands_still_is_succeeded_and_its_slot_is_freed(
    look, catalogue, start_run, instance
):
    run = start_run("a")
    lose(catalogue, "a", run)
    assert look() == []
    assert look(after_seconds=STALL_SECONDS - 1) == []
    [line] = look(after_seconds=1)
    assert "stood still" in line
    assert catalogue.get("a")["status"] == "pending"
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE


def test_the_third_loss_is_poison_and_the_administrators_are_told(
    look, catalogue, outbox, start_run
):
    catalogue.accept([Upload("a")])
    for generation in (1, 2, 3):
        catalogue.claim(
            "a", generation, start_run("a", generation, dg.DagsterRunStatus.FAILURE).run_id
        )
        look()
    row = catalogue.get("a")
    assert (row["status"], row["reason"]) == ("failed", "poison")
    assert "3 times" in row["error"]
    assert [notice["reason"] for notice in outbox.list_unsent("webhook")] == ["poison"]


def test_a_new_push_begins_the_count_again(look, catalogue, start_run):
    catalogue.accept([Upload("a")])
    for generation in (1, 2, 3):
        catalogue.claim(
            "a", generation, start_run("a", generation, dg.DagsterRunStatus.FAILURE).run_id
        )
        look()
    lose(catalogue, "a", start_run("a", 4, dg.DagsterRunStatus.FAILURE))
    look()
    assert catalogue.get("a")["status"] == "pending"


def test_a_cancelled_run_ends_its_image(look, catalogue, start_run):
    lose(catalogue, "a", start_run("a", status=dg.DagsterRunStatus.CANCELED))
    look()
    assert (catalogue.get("a")["status"], catalogue.get("a")["reason"]) == ("failed", "cancelled")


def test_an_image_whose_run_ended_before_it_began_is_asked_for_again(look, catalogue, start_run):
    catalogue.accept([Upload("a")])
    start_run("a", status=dg.DagsterRunStatus.FAILURE)
    [line] = look()
    assert f"in {RENEWAL_WAITS_SECONDS[0]} s" in line
    row = catalogue.get("a")
    assert (row["status"], row["generation"]) == ("pending", 2)
    assert row["not_before"] > row["updated_at"]
    assert look() == []


def test_an_image_whose_run_was_cancelled_before_it_began_has_failed(look, catalogue, start_run):
    catalogue.accept([Upload("a")])
    start_run("a", status=dg.DagsterRunStatus.CANCELED)
    look()
    assert catalogue.get("a")["reason"] == "cancelled"


def test_an_image_whose_run_is_on_its_way_is_left_alone(look, catalogue, start_run):
    catalogue.accept([Upload("a"), Upload("b")])
    start_run("a", status=dg.DagsterRunStatus.STARTING)
    assert look() == []
    assert catalogue.get("a")["generation"] == catalogue.get("b")["generation"] == 1


def test_a_run_that_holds_a_slot_and_no_image_is_ended(look, catalogue, start_run, instance):
    run = start_run("a")
    assert look() == []
    assert look(after_seconds=UNCLAIMED_SECONDS - 1) == []
    [line] = look(after_seconds=1)
    assert run.run_id in line
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE


def test_a_tick_says_what_it_did(catalogue, instance, tasks, start_run):
    def tick():
        resources = {"catalogue": catalogue, "tasks": tasks}
        return reconciler(
            dg.build_sensor_context(instance=instance, resources=resources)
        ).skip_message

    assert tick() == "Nothing to repair."
    lose(catalogue, "a", start_run("a", status=dg.DagsterRunStatus.FAILURE))
    assert tick() == "1 repaired."
