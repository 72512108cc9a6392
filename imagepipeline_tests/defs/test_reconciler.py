"""The reconciler recovers images that a crash has lost, once, and leaves all others alone."""

import dagster as dg
import pytest
from dagster._core.remote_origin import (
    RegisteredCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.run_coordinator import QueuedRunCoordinator

from imagepipeline.defs.outcomes import ORIGINAL
from imagepipeline.defs.reconciler import (
    MAX_PENDING_CHECKED,
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
def recover(catalogue, instance, tasks, clock):
    watch = StandstillWatch(clock)

    def recover(after_seconds=0):
        clock.now += after_seconds
        return reconcile(catalogue, instance, tasks, watch)

    return recover


def accept_claimed(catalogue, image_id, run):
    """Accepts an image and has the given run claim it."""
    catalogue.accept([Upload(image_id)])
    generation = catalogue.get(image_id)["generation"]
    return catalogue.claim(image_id, generation, run.run_id)


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS])
def test_an_image_whose_run_has_ended_waits_again(recover, catalogue, start_run, status):
    accept_claimed(catalogue, "a", start_run("a", status=status))
    [line] = recover()
    assert "a was recovered" in line
    row = catalogue.get("a")
    assert (row["status"], row["generation"]) == ("pending", 2)
    assert [event["event"] for event in row["history"]] == [
        "accepted",
        "claimed",
        "recovered",
        "handed_back",
    ]
    assert recover() == []


def test_an_image_whose_run_was_deleted_waits_again(recover, catalogue, start_run, instance):
    run = start_run("a")
    accept_claimed(catalogue, "a", run)
    instance.delete_run(run.run_id)
    recover()
    assert catalogue.get("a")["status"] == "pending"


def test_a_run_with_a_heartbeat_is_left_alone_however_long_it_takes(recover, catalogue, start_run):
    claim = accept_claimed(catalogue, "a", start_run("a"))
    for _ in range(20):
        assert recover(after_seconds=STALL_SECONDS - 1) == []
        catalogue.beat(claim)


def test_a_run_without_a_heartbeat_loses_its_image_and_its_slot(
    recover, catalogue, start_run, instance
):
    run = start_run("a")
    accept_claimed(catalogue, "a", run)
    assert recover() == []
    assert recover(after_seconds=STALL_SECONDS - 1) == []
    [line] = recover(after_seconds=1)
    assert "stood still" in line
    assert catalogue.get("a")["status"] == "pending"
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE


def test_the_third_loss_is_poison_and_the_administrators_and_the_image_page_say_so(
    recover, catalogue, outbox, start_run, instance
):
    catalogue.accept([Upload("a")])
    for generation in (1, 2, 3):
        catalogue.claim(
            "a", generation, start_run("a", generation, dg.DagsterRunStatus.FAILURE).run_id
        )
        recover()
    row = catalogue.get("a")
    assert (row["status"], row["reason"]) == ("failed", "poison")
    assert "3 times" in row["error"]
    assert [notice["reason"] for notice in outbox.list_unsent("webhook")] == ["poison"]
    shown = instance.get_latest_materialization_event(ORIGINAL).asset_materialization
    assert shown.partition == "a"
    assert shown.metadata["error"].value == row["error"]


def test_a_new_push_resets_the_count_of_losses(recover, catalogue, start_run):
    catalogue.accept([Upload("a")])
    for generation in (1, 2, 3):
        catalogue.claim(
            "a", generation, start_run("a", generation, dg.DagsterRunStatus.FAILURE).run_id
        )
        recover()
    accept_claimed(catalogue, "a", start_run("a", 4, dg.DagsterRunStatus.FAILURE))
    recover()
    assert catalogue.get("a")["status"] == "pending"


def test_the_image_of_a_cancelled_run_fails(recover, catalogue, start_run):
    accept_claimed(catalogue, "a", start_run("a", status=dg.DagsterRunStatus.CANCELED))
    recover()
    assert (catalogue.get("a")["status"], catalogue.get("a")["reason"]) == ("failed", "cancelled")


def test_a_frozen_run_that_a_person_has_cancelled_ends_as_cancelled(
    recover, catalogue, start_run, instance
):
    runs = [start_run(image_id) for image_id in ("working", "unclaimed")]
    accept_claimed(catalogue, "working", runs[0])
    catalogue.accept([Upload("unclaimed")])
    for run in runs:
        instance.report_run_canceling(run)
    assert recover() == []
    assert len(recover(after_seconds=STALL_SECONDS)) == 3  # two images, and the run without one
    for run in runs:
        assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.CANCELED
    for image_id in ("working", "unclaimed"):
        row = catalogue.get(image_id)
        assert (row["status"], row["reason"]) == ("failed", "cancelled")


def test_an_image_whose_run_ended_before_its_claim_gets_another_run(recover, catalogue, start_run):
    catalogue.accept([Upload("a")])
    start_run("a", status=dg.DagsterRunStatus.FAILURE)
    [line] = recover()
    assert f"in {RENEWAL_WAITS_SECONDS[0]} s" in line
    row = catalogue.get("a")
    assert (row["status"], row["generation"]) == ("pending", 2)
    assert row["not_before"] > row["updated_at"]
    assert recover() == []
    others = [Upload(f"b{number}", tenant="big") for number in range(MAX_PENDING_CHECKED)]
    catalogue.accept([*others, Upload("c", tenant="small")])
    start_run("c", status=dg.DagsterRunStatus.FAILURE)
    [line] = recover()
    assert line.startswith("c is requested again")


def test_an_image_whose_run_was_cancelled_before_its_claim_fails(recover, catalogue, start_run):
    catalogue.accept([Upload("a")])
    start_run("a", status=dg.DagsterRunStatus.CANCELED)
    recover()
    assert catalogue.get("a")["reason"] == "cancelled"


def test_an_image_whose_run_has_not_begun_yet_is_left_alone(recover, catalogue, start_run):
    catalogue.accept([Upload("a"), Upload("b")])
    start_run("a", status=dg.DagsterRunStatus.STARTING)
    assert recover() == []
    assert catalogue.get("a")["generation"] == catalogue.get("b")["generation"] == 1


def test_a_run_with_a_slot_but_no_image_is_ended(recover, catalogue, start_run, instance):
    run = start_run("a")
    assert recover() == []
    assert recover(after_seconds=UNCLAIMED_SECONDS - 1) == []
    [line] = recover(after_seconds=1)
    assert run.run_id in line
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE


def test_an_image_whose_run_was_created_and_never_queued_gets_another(
    recover, catalogue, start_run, instance
):
    """Dagster's database died in the tick, between the two."""
    catalogue.accept([Upload("a")])
    run = start_run("a", status=dg.DagsterRunStatus.NOT_STARTED)
    assert recover() == []
    ended, renewed = recover(after_seconds=UNCLAIMED_SECONDS)
    assert "never queued" in ended
    assert "requested again" in renewed
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE
    assert catalogue.get("a")["generation"] == 2


def test_a_tick_reports_what_it_did(catalogue, instance, tasks, start_run):
    def tick():
        resources = {"catalogue": catalogue, "tasks": tasks}
        return reconciler(
            dg.build_sensor_context(instance=instance, resources=resources)
        ).skip_message

    assert tick() == "Nothing to repair."
    accept_claimed(catalogue, "a", start_run("a", status=dg.DagsterRunStatus.FAILURE))
    assert tick() == "1 repaired."


def test_the_runs_of_cancelled_images_are_cancelled_as_the_ui_does(
    recover, catalogue, instance, start_run, monkeypatch
):
    asked = []
    coordinator = QueuedRunCoordinator()
    coordinator.register_instance(instance)
    monkeypatch.setattr(instance, "_run_coordinator", coordinator)
    monkeypatch.setattr(instance.run_launcher, "terminate", lambda run_id: not asked.append(run_id))
    repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("location"), "repository")
    origin = RemoteJobOrigin(repository, "process_upload")

    def enqueue_run(image_id, generation=1):
        status = dg.DagsterRunStatus.QUEUED
        return start_run(image_id, generation, status, remote_job_origin=origin)

    busy, queued, newer = start_run("busy"), enqueue_run("queued"), enqueue_run("queued", 2)
    enqueue_run("other")
    accept_claimed(catalogue, "busy", busy)
    catalogue.accept([Upload("queued"), Upload("other")])
    for image_id in ("busy", "queued"):
        catalogue.cancel(image_id, "a person cancelled it")
    assert len(recover()) == 2
    assert asked == [busy.run_id]  # the launcher stops the worker's child
    assert instance.get_run_by_id(queued.run_id).status == dg.DagsterRunStatus.CANCELED
    assert instance.get_run_by_id(newer.run_id).status == dg.DagsterRunStatus.QUEUED
    messages = [log.message for log in instance.all_logs(busy.run_id)]
    assert "busy was cancelled: a person cancelled it." in messages
