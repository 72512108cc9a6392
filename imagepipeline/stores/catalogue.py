"""Catalogue: the SQL record of all images, and the only place that decides an image's status.

Every change is one transaction. Every change by a run names the fencing token of its claim, so that
a run that was thought dead and replaced can change nothing any more.
"""

import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from imagepipeline.errors import (
    CatalogueTakenError,
    ImageBusyError,
    PathTakenError,
    StaleClaimError,
)
from imagepipeline.events import EventType
from imagepipeline.models import (
    ASSETS,
    BULK_PRIORITY,
    Claim,
    ImageMetadata,
    OriginalFacts,
    Recipe,
    Status,
    Upload,
    Variant,
    check_image_id,
)
from imagepipeline.stores import events, history, outbox, retention
from imagepipeline.stores.reader import Pending, Reader
from imagepipeline.stores.retention import ENDED
from imagepipeline.stores.tables import (
    applies,
    catalogue_owner,
    erasures,
    image_history,
    image_results,
    image_variants,
    images,
    select_at_paths,
)
from imagepipeline.text import hash_text

CANDIDATES = 16  # more than there are threads of batch runs, each of which takes one
RESTORE_RAISES = 1_000_000  # all fences (docs/operations.md); an image is not claimed so often
POISON_RECOVERIES, POISON_WINDOW = 3, timedelta(hours=72)


class Catalogue(Reader):
    """The images of one database: what a `Reader` tells of them, and all that changes them."""

    def migrate(self) -> None:
        """Creates or updates the tables; several processes may call it at once.

        Tables to which a newer version has added are left as they are.

        Raises:
            StackError: a newer version has removed something that this version needs.
        """
        # Imported here, because Alembic takes as long as everything else together.
        from imagepipeline.stores import migrations

        if self._database.engine.dialect.name == "sqlite" and self._database.engine.url.database:
            Path(self._database.engine.url.database).parent.mkdir(parents=True, exist_ok=True)
        with self._database.engine.begin() as connection:
            if self._database.engine.dialect.name == "postgresql":
                # Another migration, or an index of a large table, may take minutes.
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
                connection.execute(
                    sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext("imagepipeline")))
                )
            migrations.upgrade(connection)

    def bind(self, dagster_instance_id: str, is_taken_over: bool = False) -> None:
        """Ties the catalogue to the first Dagster instance that asks, or to this one by force.

        Raises:
            CatalogueTakenError: it is tied to another one.
        """
        now = self._clock()
        row = {"dagster_instance_id": dagster_instance_id, "since": now}
        insert = self._database.insert(catalogue_owner).values(id=1, **row)
        changes = row if is_taken_over else {"id": 1}
        with self._database.transaction() as connection:
            earlier = connection.execute(sa.select(catalogue_owner)).first()
            connection.execute(insert.on_conflict_do_update(index_elements=["id"], set_=changes))
            owner = connection.execute(sa.select(catalogue_owner)).one()
            if earlier and earlier.dagster_instance_id != owner.dagster_instance_id:
                retention.note_all_gone(connection)
        if owner.dagster_instance_id != dagster_instance_id:
            raise CatalogueTakenError(
                "the catalogue belongs to another Dagster instance "
                f"({owner.dagster_instance_id}, since {owner.since:%F %R} UTC), and each would "
                "take the other's runs for dead: give this stack a DATABASE_URL and a storage root "
                "of its own, or if the other one is gone for good, run "
                "`imagepipeline migrate --take-over`"
            )

    def accept(self, uploads: Iterable[Upload], event: str = "accepted") -> set[str]:
        """Records uploads as `pending`; returns the IDs for which this began a new generation.

        For an image that is pending or processing, the push is counted. If its run has started, the
        image begins another generation when that run ends.
        """
        pushes = _merge(uploads, self._clock())
        if not pushes:
            return set()
        with self._database.transaction() as connection:
            self._lock(connection, pushes)
            begun = self._begin(connection, pushes)
            history.record_all(connection, begun, event, self._clock())
            if others := [push for push in pushes if push["image_id"] not in begun]:
                self._note_pushes(connection, others)
        return begun

    def accept_imported(self, uploads: Iterable[Upload]) -> None:
        """Records unknown images as `pending` in the bulk lane; others stay as they are."""
        rows = [{**row, "most": BULK_PRIORITY} for row in _merge(uploads, self._clock())]
        if not rows:
            return
        insert = self._insert().on_conflict_do_nothing().returning(images.c.id)
        with self._database.transaction() as connection:
            self._lock(connection, rows)
            begun = set(connection.execute(insert, rows).scalars())
            history.record_all(connection, begun, "imported", self._clock())

    def begin_planned(self, image_ids: Sequence[str], apply_id: int) -> list[str]:
        """Begins a generation of completed images in the bulk lane; gives those begun.

        They are counted for their apply in the same transaction. The IDs must be in the database's
        order, and at least one.
        """
        begun = []
        values = {"priority": BULK_PRIORITY, "apply_id": apply_id}
        with self._database.transaction() as connection:
            for image_id in image_ids:
                statement = (
                    sa.update(images)
                    .where(images.c.id == image_id, images.c.status == Status.COMPLETED)
                    .values(_new_generation(self._clock()) | values)
                )
                if connection.execute(statement).rowcount:
                    self._record(connection, image_id, "planned")
                    begun.append(image_id)
            counted = {
                "begun_count": applies.c.begun_count + len(begun),
                "last_id": image_ids[-1],
            }
            connection.execute(sa.update(applies).where(applies.c.id == apply_id).values(counted))
        return begun

    def claim_next(
        self,
        run_id: str,
        uploads_left: int | None = None,
        find_limit: Callable[[str], float] = lambda tenant: math.inf,
        lacking: Recipe | None = None,
    ) -> Claim | None:
        """Claims the oldest planned image that is due; None if none is.

        With `uploads_left`, it claims an upload instead: the first one in line after so many of its
        tenant, which are left to runs of their own. So are uploads that were handed back or
        recovered. Tenants take turns: the one with the fewest images in runs comes first, and none
        gets more than `find_limit` gives for it. With `lacking`, only images without variants by
        that recipe.
        """
        for tenant in self._take_turns(find_limit, uploads_left is None):
            if claim := self._claim_next_of(tenant, run_id, uploads_left, lacking):
                return claim
        return None

    def has_next(
        self,
        uploads_left: int | None,
        find_limit: Callable[[str], float],
        lacking: Recipe | None = None,
    ) -> bool:
        """Whether there is an image that `claim_next` would claim."""
        for tenant in self._take_turns(find_limit, uploads_left is None):
            query = self._select_next(tenant, uploads_left, lacking)
            query = query.offset(uploads_left or 0).limit(1)
            with self._database.reading() as connection:
                if connection.execute(query).first():
                    return True
        return False

    def _take_turns(self, find_limit: Callable[[str], float], in_bulk_lane: bool) -> Iterator[str]:
        tenants = self.list_waiting_tenants(in_bulk_lane)
        held = self.count_by_tenant(Status.PROCESSING) if any(tenants) else {}
        random.shuffle(tenants)  # so that none of many is always last
        for tenant in sorted(tenants, key=lambda tenant: held.get(tenant, 0)):
            if held.get(tenant, 0) < find_limit(tenant):
                yield tenant

    def _select_next(
        self, tenant: str, uploads_left: int | None, lacking: Recipe | None
    ) -> sa.Select[tuple[str]]:
        order = (images.c.priority.desc(), images.c.accepted_at, images.c.id)
        which = images.c.priority == BULK_PRIORITY
        if uploads_left is not None:
            is_first_try = images.c.generation == images.c.accepted_generation
            which = sa.and_(images.c.priority > BULK_PRIORITY, is_first_try)
        if lacking is not None:
            made = image_results.c
            has_variants = sa.select(made.image_id).where(
                made.image_id == images.c.id,
                made.asset == "variants",
                made.provider == lacking.provider,
                made.model == lacking.model,
                made.settings == lacking.settings,
                made.is_stale.is_(False),
            )
            which = sa.and_(which, ~has_variants.exists())
        return (
            sa.select(images.c.id)
            .where(self._is_due(), images.c.tenant == tenant, which)
            .order_by(*order)
        )

    def _claim_next_of(
        self, tenant: str, run_id: str, uploads_left: int | None, lacking: Recipe | None
    ) -> Claim | None:
        next_ones = self._select_next(tenant, uploads_left, lacking)
        # By itself, because Postgres would lock those before the offset, too.
        candidates = next_ones.offset(uploads_left or 0).limit(CANDIDATES)
        first = (
            next_ones.where(images.c.id.in_(candidates))
            .limit(1)
            .with_for_update(skip_locked=True)  # two workers take different ones
        )
        with self._database.transaction() as connection:
            image_id = connection.execute(first).scalar()
            if image_id is None:
                return None
            self._take(connection, run_id, images.c.id == image_id)
            return self._claim_of(connection, image_id, run_id)

    def claim(self, image_id: str, generation: int, run_id: str) -> Claim | None:
        """Claims a generation of an image for a run: the first to ask gets it, also repeatedly.

        Returns:
            None if the generation is not pending any more, or another run holds it.
        """
        with self._database.transaction() as connection:
            self._take(
                connection, run_id, images.c.id == image_id, images.c.generation == generation
            )
            return self._claim_of(connection, image_id, run_id)

    def claim_anew(self, image_id: str, run_id: str) -> Claim:
        """Claims an image for a run that a person started, whatever the image's status.

        An image that had ended begins a new generation; an unknown one is recorded.

        Raises:
            ImageBusyError: another run is processing it.
            InvalidUploadError: it is not an image ID; a person can make any text a partition.
        """
        check_image_id(image_id)
        now = self._clock()
        with self._database.transaction() as connection:
            known = connection.execute(
                sa.select(images.c.status, images.c.run_id)
                .where(images.c.id == image_id)
                .with_for_update()
            ).first()
            if known is None:
                insert = self._database.insert(images).values(
                    id=image_id, priority=0, **_first_generation(now, image_id)
                )
                connection.execute(insert.on_conflict_do_nothing())  # another may just do it
            elif known.status in ENDED:
                connection.execute(
                    sa.update(images).where(images.c.id == image_id).values(_new_generation(now))
                )
            elif known.status == Status.PROCESSING and known.run_id != run_id:
                raise ImageBusyError(
                    f"run {known.run_id} is processing {image_id}: wait until it has ended"
                )
            self._take(connection, run_id, images.c.id == image_id)
            claim = self._claim_of(connection, image_id, run_id)
        if claim is None:
            raise ImageBusyError(f"another run claimed {image_id} at the same moment: try again")
        return claim

    def beat(self, claim: Claim) -> None:
        """Shows that the claim's run is alive."""
        with self._database.transaction() as connection:
            self._update(connection, claim, beat=images.c.beat + 1)

    def holds(self, claim: Claim) -> bool:
        """Whether no later claim has replaced this one."""
        with self._database.reading() as connection:
            found = sa.select(images.c.id).where(*_is_held(claim))
            return connection.execute(found).first() is not None

    def record_attempt(self, claim: Claim, attempt: int) -> None:
        """Records the number of an attempt at an asset, from 1."""
        most = sa.case((images.c.attempts < attempt, attempt), else_=images.c.attempts)
        with self._database.transaction() as connection:
            self._update(connection, claim, attempts=most, beat=images.c.beat + 1)

    def record_failure(
        self, claim: Claim, asset: str, attempt: int, wait_seconds: float, error: str
    ) -> None:
        """Records that an attempt at an asset failed, and how long the next one waits."""
        detail = f"{asset}, attempt {attempt}, next in {wait_seconds:g} s: {error}"
        with self._database.transaction() as connection:
            self._update(connection, claim, error=history.cut(error))
            self._record(connection, claim.image_id, "attempt_failed", detail)

    def save_original(self, claim: Claim, facts: OriginalFacts) -> None:
        """Stores the facts about the original; results of another original become stale."""
        with self._database.transaction() as connection:
            self._update(connection, claim, **asdict(facts))
            made_of_it = image_results.c.asset.in_(("metadata", "variants"))
            self._mark_stale(connection, claim.image_id, made_of_it, facts.original_sha256)

    def save_metadata(
        self, claim: Claim, metadata: ImageMetadata, recipe: Recipe, input_sha256: str
    ) -> None:
        """Stores the vision model's answer; an embedding of another text becomes stale."""
        with self._database.transaction() as connection:
            self._update(connection, claim, metadata=metadata.model_dump(by_alias=True))
            self._record_result(connection, claim, "metadata", recipe, input_sha256)
            of_text = image_results.c.asset == "embedding"
            self._mark_stale(
                connection, claim.image_id, of_text, hash_text(metadata.embedding_text)
            )

    def save_variants(
        self,
        claim: Claim,
        variants: Sequence[tuple[str, Variant]],
        kept: Mapping[str, str] | None = None,
    ) -> None:
        """Stores (path, variant) rows in place of older ones; call it before writing the files.

        Until `record_result`, none of them is known to be right, and new ones are not published.

        Args:
            claim: the run's claim.
            variants: what was rendered, with the paths the files will have.
            kept: what made the variants that stay as they are, by row ID.

        Raises:
            PathTakenError: a path belongs to another image; nothing was stored.
        """
        rows = [
            {
                "id": f"{claim.image_id}-{variant.spec.id}",
                "image_id": claim.image_id,
                "width": variant.width,
                "height": variant.height,
                "format": variant.spec.format,
                "path": path,
                "size": len(variant.content),
                "is_alias": variant.spec.is_alias(path),
                "recipe": None,
                "is_published": False,
            }
            for path, variant in variants
        ]
        insert = self._database.insert(image_variants)
        # An earlier file at the same path is shown until it is replaced.
        is_shown = sa.and_(
            image_variants.c.is_published, image_variants.c.path == insert.excluded.path
        )
        changes = {name: insert.excluded[name] for name in rows[0]} | {"is_published": is_shown}
        insert = insert.on_conflict_do_update(index_elements=["id"], set_=changes)
        try:
            with self._database.transaction() as connection:
                self._update(connection, claim)
                # Until all files are written and checked, the earlier result is not current.
                self._mark_stale(connection, claim.image_id, image_results.c.asset == "variants")
                self._note_recipes(connection, kept or {})
                connection.execute(insert, rows)
        except sa.exc.IntegrityError:
            raise PathTakenError(
                f"another image already has a variant at {rows[0]['path']}: originals that differ "
                "only in their extension share their variants' paths, so rename one"
            ) from None

    def distrust_variants(self, claim: Claim) -> None:
        """Forgets what made the saved variants, also those kept, so that all are made again."""
        with self._database.transaction() as connection:
            self._update(connection, claim)
            self._forget_recipes(connection, claim.image_id)

    def distrust_files(self, image_id: str, paths: Collection[str]) -> set[str]:
        """Has variants made again: a run that had lost its image may have changed their files.

        Those of the image, and of others that have the paths by now. They are `pending` again, also
        if a run holds them, since it may have checked its files before.

        Returns:
            Those of the paths at which no image has a variant.
        """
        others = select_at_paths(image_variants.c.image_id, paths)
        with self._database.transaction() as connection:
            image_ids = {image_id, *connection.execute(others).scalars()}
            touched = (
                sa.select(images.c.id, images.c.status)
                .where(images.c.id.in_(image_ids))
                .order_by(images.c.id)
                .with_for_update()
            )
            for row in connection.execute(touched).all():
                self._forget_recipes(connection, row.id)
                self._mark_stale(connection, row.id, image_results.c.asset == "variants")
                if row.status in (Status.COMPLETED, Status.PROCESSING):
                    again = (
                        self._pending_again(0)
                        if row.status == Status.PROCESSING
                        else _new_generation(self._clock())
                    )
                    of_image = sa.update(images).where(images.c.id == row.id)
                    connection.execute(of_image.values(again))
                cause = "a run that had lost an image wrote over its variants"
                self._record(connection, row.id, "reopened", cause)
            known = select_at_paths(image_variants.c.path, paths)
            return set(paths) - set(connection.execute(known).scalars())

    def remove_variants(self, claim: Claim, row_ids: Collection[str]) -> None:
        """Removes rows of variants whose files are deleted."""
        of_image = image_variants.c.image_id == claim.image_id
        with self._database.transaction() as connection:
            self._update(connection, claim)
            connection.execute(
                sa.delete(image_variants).where(of_image, image_variants.c.id.in_(row_ids))
            )

    def record_result(
        self,
        claim: Claim,
        asset: str,
        recipe: Recipe,
        input_sha256: str,
        variants: Mapping[str, str] | None = None,
    ) -> None:
        """Records that an asset's result is stored, what made it, and from which input.

        Args:
            claim: the run's claim.
            asset: the asset.
            recipe: what made it.
            input_sha256: what it was made from.
            variants: what made each variant, by row ID. They are published, and the image's other
                variants are not any more. None publishes all.
        """
        with self._database.transaction() as connection:
            self._update(connection, claim)
            self._record_result(connection, claim, asset, recipe, input_sha256)
            if asset == "variants":
                self._note_recipes(connection, variants or {})
                of_image = sa.update(image_variants).where(
                    image_variants.c.image_id == claim.image_id
                )
                connection.execute(of_image.values(is_published=True))
                if variants is not None:  # the others are of whatever original was there before
                    others = of_image.where(image_variants.c.id.not_in(variants))
                    connection.execute(others.values(is_published=False, recipe=None))
            if asset == "variants" and events.lacks_description(connection, claim.image_id):
                self._tell(connection, claim.image_id, EventType.PICTURES_READY)

    def confirm_result(self, claim: Claim, asset: str) -> None:
        """Records that an asset's result is current and was reused."""
        statement = (
            sa.update(image_results)
            .where(image_results.c.image_id == claim.image_id, image_results.c.asset == asset)
            .values(generation=claim.generation)
        )
        with self._database.transaction() as connection:
            self._update(connection, claim)
            connection.execute(statement)
            self._record(connection, claim.image_id, "reused", asset)

    def record_problems(self, claim: Claim, problems: Mapping[str, Sequence[str]]) -> None:
        """Writes the problems that each check has found into the image's history."""
        if not any(problems.values()):
            return
        with self._database.transaction() as connection:
            self._update(connection, claim)
            for name, found in problems.items():
                for problem in found:
                    self._record(connection, claim.image_id, "check_failed", f"{name}: {problem}")

    def finish(self, claim: Claim) -> Status:
        """Ends a claim: `completed` if all results are stored, else `pending` for another run.

        Results count only if they were made from the same original. The image is `pending` again,
        too, if it was pushed after the run started.
        """
        results = sa.select(image_results.c.asset, image_results.c.is_stale).where(
            image_results.c.image_id == claim.image_id
        )
        with self._database.transaction() as connection:
            is_stale = dict(connection.execute(results).tuples().all())
            if missing := [asset for asset in ASSETS if is_stale.get(asset, True)]:
                cause = f"results are missing or stale: {', '.join(missing)}"
                self._hand_back(connection, claim, cause, 0)
                return Status.PENDING
            self._update(connection, claim, status=Status.COMPLETED, error=None)
            self._record(connection, claim.image_id, "completed")
            self._tell(connection, claim.image_id, EventType.COMPLETED)
            return (
                Status.PENDING
                if self._begin_if_pushed(connection, claim.image_id)
                else Status.COMPLETED
            )

    def fail(self, claim: Claim, reason: str, error: str) -> None:
        """Ends a claim as `failed`, with a code and a sentence, and adds a notice to the outbox."""
        with self._database.transaction() as connection:
            self._fail(connection, claim, reason, error)

    def hand_back(self, claim: Claim, cause: str, wait_seconds: float = 0) -> None:
        """Gives up a claim: the image is `pending` in a new generation, due after a wait."""
        with self._database.transaction() as connection:
            self._hand_back(connection, claim, cause, wait_seconds)

    def recover(self, claim: Claim, cause: str) -> Status:
        """Takes an image from a run that is lost: `pending` again, or `failed` the third time.

        Counts the recoveries since the image was accepted, within 72 hours: an image that loses its
        run again and again probably kills it.

        Raises:
            StaleClaimError: the run ended, or another one took over, in the meantime.
        """
        since = self._clock() - POISON_WINDOW
        count = sa.select(sa.func.count()).where(
            image_history.c.image_id == claim.image_id,
            image_history.c.event == "recovered",
            image_history.c.at >= history.accepted_at(claim.image_id),
            image_history.c.at >= since,
        )
        with self._database.transaction() as connection:
            earlier = connection.execute(count).scalar_one()
            self._update(connection, claim)
            self._record(connection, claim.image_id, "recovered", cause)
            if earlier + 1 >= POISON_RECOVERIES:
                return self._fail(
                    connection,
                    claim,
                    "poison",
                    f"its run was lost {earlier + 1} times, the last time because {cause}",
                )
            self._hand_back(connection, claim, cause, 0)
            # It leaves the bulk lane: if it kills its process, it kills no others' work again.
            alone = sa.update(images).where(
                images.c.id == claim.image_id, images.c.priority == BULK_PRIORITY
            )
            connection.execute(alone.values(priority=BULK_PRIORITY + 1))
            return Status.PENDING

    def renew(self, pending: Pending, cause: str, wait_seconds: float) -> bool:
        """Begins a new generation of an image whose run ended before it claimed the image.

        Returns:
            False if it was claimed meanwhile.
        """
        statement = (
            sa.update(images)
            .where(
                images.c.id == pending.image_id,
                images.c.generation == pending.generation,
                images.c.status == Status.PENDING,
            )
            .values(self._pending_again(wait_seconds))
        )
        with self._database.transaction() as connection:
            if not connection.execute(statement).rowcount:
                return False
            self._record(connection, pending.image_id, "renewed", cause)
            return True

    def fail_pending(self, pending: Pending, reason: str, error: str) -> bool:
        """Ends a pending image as `failed`; False if it was claimed meanwhile."""
        of_generation = images.c.generation == pending.generation
        with self._database.transaction() as connection:
            self._take(connection, reason, images.c.id == pending.image_id, of_generation)
            claim = self._claim_of(connection, pending.image_id, reason)
            if claim is None:
                return False
            self._fail(connection, claim, reason, error)
        return True

    def cancel(self, image_id: str, error: str) -> Status | None:
        """Ends a pending or processing image as `failed` with the reason `cancelled`.

        This covers all pushes so far. A run that holds the image can write nothing more.

        Returns:
            The status it had; None if there is no such image, or it has ended.
        """
        of_image = images.c.id == image_id
        unended = sa.select(images.c.status).where(of_image, images.c.status.not_in(ENDED))
        with self._database.transaction() as connection:
            status = connection.execute(unended.with_for_update()).scalar()
            if status is None:
                return None
            if status == Status.PENDING:
                self._take(connection, "cancelled", of_image)
            columns = (images.c.id, images.c.generation, images.c.fence, images.c.requested_path)
            statement = sa.update(images).where(of_image).values(pushes_seen=images.c.pushes)
            claim = Claim(*connection.execute(statement.returning(*columns)).one())
            self._fail(connection, claim, "cancelled", error)
            return Status(status)

    def prioritize(self, image_id: str, priority: int) -> bool:
        """Changes the priority of a pending image; returns False if it is not pending."""
        statement = (
            sa.update(images)
            .where(images.c.id == image_id, images.c.status == Status.PENDING)
            .values(priority=priority, updated_at=self._clock())
        )
        with self._database.transaction() as connection:
            if not connection.execute(statement).rowcount:
                return False
            self._record(connection, image_id, "prioritized", str(priority))
            return True

    def reopen(self, reason: str, since: datetime) -> int:
        """Makes images that failed for this reason since then pending again; returns their number.

        Notices that were not sent yet are withdrawn.
        """
        failures = sa.and_(
            images.c.status == Status.FAILED,
            images.c.reason == reason,
            images.c.updated_at >= since,
            images.c.discarded_at.is_(None),
        )
        # Locked, so that no run claims one meanwhile; in the order in which `accept` locks.
        found = sa.select(images.c.id).where(failures).order_by(images.c.id).with_for_update()
        with self._database.transaction() as connection:
            image_ids = connection.execute(found).scalars().all()
            for image_id in image_ids:
                outbox.withdraw_unsent(connection, image_id)
                connection.execute(
                    sa.update(images)
                    .where(images.c.id == image_id)
                    .values(_new_generation(self._clock()))
                )
                self._record(connection, image_id, "reopened", f"it had failed as {reason}")
        return len(image_ids)

    def _record(
        self, connection: sa.Connection, image_id: str, event: str, detail: str | None = None
    ) -> None:
        history.record(connection, image_id, event, self._clock(), detail)

    def _tell(self, connection: sa.Connection, image_id: str, event: EventType) -> None:
        events.add(connection, image_id, event, self._clock())

    def _take(
        self, connection: sa.Connection, run_id: str, *conditions: sa.ColumnElement[bool]
    ) -> None:
        """Claims the pending row that meets the conditions, if there is one."""
        statement = (
            sa.update(images)
            .where(images.c.status == Status.PENDING, *conditions)
            .values(
                status=Status.PROCESSING,
                run_id=run_id,
                fence=images.c.fence + 1,
                beat=images.c.beat + 1,
                pushes_seen=images.c.pushes,
                not_before=None,
                in_dagster=retention.WITH_RUNS,
                in_dagster_since=self._clock(),
                updated_at=self._clock(),
            )
            .returning(images.c.id)
        )
        for image_id in connection.execute(statement).scalars().all():
            self._record(connection, image_id, "claimed")

    def _claim_of(self, connection: sa.Connection, image_id: str, run_id: str) -> Claim | None:
        row = connection.execute(
            sa.select(images).where(
                images.c.id == image_id,
                images.c.status == Status.PROCESSING,
                images.c.run_id == run_id,
            )
        ).first()
        if row is None:
            return None
        return Claim(
            image_id=row.id,
            generation=row.generation,
            fence=row.fence,
            path=row.requested_path,
            last_path=row.path,
            last_sha256=row.original_sha256,
            tenant=row.tenant,
            focus=read_focus(row.focus),
            is_planned=row.priority == BULK_PRIORITY,
        )

    def _record_result(
        self, connection: sa.Connection, claim: Claim, asset: str, recipe: Recipe, input_sha256: str
    ) -> None:
        values = {
            "generation": claim.generation,
            "provider": recipe.provider,
            "model": recipe.model,
            "settings": recipe.settings,
            "input_sha256": input_sha256,
            "made_at": self._clock(),
            "is_stale": False,
        }
        insert = self._database.insert(image_results).values(
            image_id=claim.image_id, asset=asset, **values
        )
        connection.execute(
            insert.on_conflict_do_update(index_elements=["image_id", "asset"], set_=values)
        )
        self._record(connection, claim.image_id, "made", f"{asset} by {recipe.version}")

    def _note_recipes(self, connection: sa.Connection, recipes: Mapping[str, str]) -> None:
        """Writes what made variants into their rows, by row ID."""
        statement = sa.update(image_variants).where(image_variants.c.id == sa.bindparam("row_id"))
        if recipes:
            connection.execute(
                statement.values(recipe=sa.bindparam("made_by")),
                [{"row_id": row_id, "made_by": made_by} for row_id, made_by in recipes.items()],
            )

    def _forget_recipes(self, connection: sa.Connection, image_id: str) -> None:
        of_image = image_variants.c.image_id == image_id
        connection.execute(sa.update(image_variants).where(of_image).values(recipe=None))

    def _mark_stale(
        self,
        connection: sa.Connection,
        image_id: str,
        which: sa.ColumnElement[bool],
        input_sha256: str | None = None,
    ) -> None:
        """Marks some of the image's results as stale; with an input, only those of another one."""
        statement = sa.update(image_results).where(image_results.c.image_id == image_id)
        if input_sha256 is not None:
            statement = statement.where(image_results.c.input_sha256 != input_sha256)
        connection.execute(statement.where(which).values(is_stale=True))

    def _update(self, connection: sa.Connection, claim: Claim, **values: Any) -> None:
        """Changes the claimed row; raises StaleClaimError if a later claim replaced this one."""
        statement = (
            sa.update(images)
            .where(*_is_held(claim))
            .values({"updated_at": self._clock(), **values})
        )
        if connection.execute(statement).rowcount == 0:
            raise StaleClaimError(
                f"the claim on {claim.image_id} (fence {claim.fence}) was taken over"
            )

    def _hand_back(
        self, connection: sa.Connection, claim: Claim, cause: str, wait_seconds: float
    ) -> None:
        self._update(connection, claim, **self._pending_again(wait_seconds))
        self._record(connection, claim.image_id, "handed_back", cause)

    def _pending_again(self, wait_seconds: float) -> dict[str, Any]:
        now = self._clock()
        return {
            "status": Status.PENDING,
            "generation": images.c.generation + 1,  # a used run key starts no second run
            "fence": images.c.fence + 1,
            "not_before": now + timedelta(seconds=wait_seconds) if wait_seconds else None,
            "updated_at": now,
        }

    def _fail(self, connection: sa.Connection, claim: Claim, reason: str, error: str) -> Status:
        """Ends a claim as failed, or pending if the image was pushed after the run started.

        In the latter case there is no notice.
        """
        self._update(
            connection, claim, status=Status.FAILED, reason=reason, error=history.cut(error)
        )
        self._record(connection, claim.image_id, "failed", f"{reason}: {error}")
        self._tell(connection, claim.image_id, EventType.FAILED)
        if self._begin_if_pushed(connection, claim.image_id):
            return Status.PENDING
        outbox.add(connection, claim.image_id, self._clock())
        return Status.FAILED

    def _lock(self, connection: sa.Connection, pushes: Sequence[Mapping[str, Any]]) -> None:
        """Waits for whoever changes one of these images, and stops others until the commit.

        Without it, an insert could wait for an erasure and not see the numbers that this has kept:
        on Postgres, a statement sees what was committed when it began. Nor do two calls insert at
        once, as one could wait for an image that the other has locked when it was known already.
        """
        if self._database.engine.dialect.name == "postgresql":
            key = sa.func.hashtext("imagepipeline accept")
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))
        ids = [push["image_id"] for push in pushes]
        known = sa.select(images.c.id).where(images.c.id.in_(ids)).order_by(images.c.id)
        connection.execute(known.with_for_update())

    def _begin(self, connection: sa.Connection, pushes: Sequence[Mapping[str, Any]]) -> set[str]:
        """Begins a generation of those images that are unknown or have ended; gives their IDs."""
        insert = self._insert()
        new_life = _new_generation(insert.excluded.accepted_at) | {
            "priority": insert.excluded.priority,
            "requested_path": insert.excluded.requested_path,
            "focus": sa.func.coalesce(insert.excluded.focus, images.c.focus),
            "tenant": _prefer(insert.excluded.tenant),
            "pushes": images.c.pushes + insert.excluded.pushes,
        }
        statement = insert.on_conflict_do_update(
            index_elements=[images.c.id],
            set_=new_life,
            where=sa.or_(*(images.c.status == status for status in ENDED)),
        ).returning(images.c.id)
        return set(connection.execute(statement, list(pushes)).scalars())

    def _insert(self) -> Any:
        """An insert of an unknown image, which takes the rows of `_merge`."""
        return self._database.insert(images).values(
            id=sa.bindparam("image_id"),
            priority=sa.bindparam("most"),
            requested_path=sa.bindparam("last_path"),
            focus=sa.bindparam("last_focus"),
            tenant=sa.bindparam("of_tenant"),
            pushes=sa.bindparam("count"),
            **_first_generation(sa.bindparam("now"), sa.bindparam("known_id")),
        )

    def _note_pushes(self, connection: sa.Connection, pushes: Sequence[Mapping[str, Any]]) -> None:
        """Counts pushes of images that have not ended; the next run uses the last push's path."""
        most = sa.bindparam("most", type_=sa.Integer)
        statement = (
            sa.update(images)
            .where(images.c.id == sa.bindparam("image_id"))
            .values(
                pushes=images.c.pushes + sa.bindparam("count", type_=sa.Integer),
                requested_path=sa.bindparam("last_path"),
                priority=sa.case((images.c.priority < most, most), else_=images.c.priority),
                focus=sa.func.coalesce(
                    sa.bindparam("last_focus", type_=images.c.focus.type), images.c.focus
                ),
                tenant=_prefer(sa.bindparam("of_tenant", type_=sa.String)),
            )
        )
        connection.execute(statement, list(pushes))
        image_ids = {push["image_id"] for push in pushes}
        processing = images.c.status == Status.PROCESSING
        history.record_all(connection, image_ids, "pushed_again", self._clock(), processing)

    def _begin_if_pushed(self, connection: sa.Connection, image_id: str) -> bool:
        """Begins another generation of an image that has just ended, if it was pushed meanwhile."""
        statement = (
            sa.update(images)
            .where(images.c.id == image_id, images.c.pushes > images.c.pushes_seen)
            .values(_new_generation(self._clock()))
        )
        if not connection.execute(statement).rowcount:
            return False
        self._record(
            connection, image_id, "accepted", "it was pushed again while a run processed it"
        )
        return True


def _is_held(claim: Claim) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        images.c.id == claim.image_id,
        images.c.fence == claim.fence,
        images.c.status == Status.PROCESSING,
    )


def read_focus(stored: Any) -> tuple[float, float] | None:
    """The focus in the column of a row; None if no upload gave one."""
    return (stored["x"], stored["y"]) if stored else None


def _store_focus(upload: Upload) -> dict[str, float] | None:
    return dict(zip("xy", upload.focus, strict=True)) if upload.focus else None


def _merge(uploads: Iterable[Upload], now: datetime) -> list[dict[str, Any]]:
    """One row of parameters for each image, however often it was pushed.

    They are in the order of their IDs, so that two calls at once cannot lock each other out.
    """
    rows: dict[str, dict[str, Any]] = {}
    for position, upload in enumerate(uploads):
        row = rows.setdefault(
            upload.image_id,
            {
                "image_id": upload.image_id,
                "known_id": upload.image_id,  # a column's name may stand for its value alone
                "count": 0,
                "most": upload.priority,
                "of_tenant": "",
                "last_focus": None,
                "now": now + timedelta(microseconds=position),  # they keep their order
            },
        )
        row["count"] += 1
        row["most"] = max(row["most"], upload.priority)
        row["last_path"] = upload.path
        row["of_tenant"] = upload.tenant or row["of_tenant"]
        row["last_focus"] = _store_focus(upload) or row["last_focus"]
    return [rows[image_id] for image_id in sorted(rows)]


def _prefer(tenant: sa.ColumnElement[str]) -> sa.ColumnElement[str]:
    """That tenant, or the image's own if that is empty."""
    return sa.func.coalesce(sa.func.nullif(tenant, ""), images.c.tenant)


def _first_generation(now: Any, image_id: Any) -> dict[str, Any]:
    """Column values of an unknown image; one that was erased goes on with its numbers.

    The fence begins where a restore has raised all others to: if the image came after the backup,
    the index knows the numbers it had.
    """
    erased = [
        sa.select(column).where(erasures.c.image_id == image_id).scalar_subquery()
        for column in (erasures.c.generation, erasures.c.fence)
    ]
    known = images.alias()
    raised = sa.select(known.c.fence - known.c.fence % RESTORE_RAISES).order_by(known.c.id).limit(1)
    generation = sa.func.coalesce(erased[0], 0)
    fence = sa.func.coalesce(erased[1], raised.scalar_subquery(), 0)
    return {
        "status": Status.PENDING,
        "generation": generation + 1,
        "accepted_generation": generation + 1,
        "fence": fence,
        "attempts": 0,
        "beat": 0,
        "accepted_at": now,
        "updated_at": now,
    }


def _new_generation(now: Any) -> dict[str, Any]:
    """Column values that begin a new generation; results stay until they are replaced."""
    return {
        "status": Status.PENDING,
        "generation": images.c.generation + 1,
        "accepted_generation": images.c.generation + 1,
        "fence": images.c.fence + 1,
        "attempts": 0,
        "reason": None,
        "error": None,
        "not_before": None,
        "discarded_at": None,
        "accepted_at": now,
        "updated_at": now,
    }
