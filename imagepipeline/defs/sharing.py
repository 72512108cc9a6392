"""How tenants share the slots: in turn, whoever has the fewest images in runs comes next."""

import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import dagster as dg

from imagepipeline.defs.attempts import read_generation
from imagepipeline.models import PRIORITY_LIMIT
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.reader import Pending

TENANT_TAG = "imagepipeline/tenant"
VARIANTS = [dg.AssetKey("variants")]
STEP = 2 * PRIORITY_LIMIT + 1  # more than priorities of uploads can differ


@dataclass
class InFlight:
    """The runs of single uploads that have not ended.

    Attributes:
        images: the (ID, generation) of each.
        full_count: how many of them are not runs of variants alone, which need no paid call.
        priorities: of the uploads, by tenant; the empty one stands for uploads without a tenant.
    """

    images: set[tuple[str, int]] = field(default_factory=set)
    full_count: int = 0
    priorities: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def read(cls, runs: Iterable[dg.DagsterRun]) -> "InFlight":
        """From the runs' tags."""
        found = cls()
        for run in runs:
            image_id, generation = run.tags.get("dagster/partition"), read_generation(run.tags)
            if image_id and generation is not None:
                found.images.add((image_id, generation))
                found.full_count += run.asset_selection != set(VARIANTS)
                own = _read_own_priority(run.tags.get("dagster/priority", "0"))
                found.priorities[run.tags.get(TENANT_TAG, "")].append(own)
        return found

    def rank(self, following: Sequence[Pending], limit: int) -> list[int]:
        """The priorities in Dagster's queue of the runs that are requested next, in their order.

        The fewer runs a tenant has in the queue before one, the higher; then by the priority of the
        upload. While all runs are of one tenant, it is the priority of the upload.

        Args:
            following: the images of the runs.
            limit: how many runs may be queued or running.
        """
        priorities = defaultdict(list, {key: [*value] for key, value in self.priorities.items()})
        is_shared = len({*priorities, *(image.tenant for image in following)}) > 1
        ranks = []
        for image in following:
            earlier = priorities[image.tenant]
            position = sum(priority >= image.priority for priority in earlier)
            ranks.append(image.priority + STEP * max(0, limit - position) * is_shared)
            earlier.append(image.priority)
        return ranks


def _read_own_priority(text: str) -> int:
    """The priority of the upload itself, from what `InFlight.rank` gave; anyone may write a tag."""
    try:
        return (int(text) + PRIORITY_LIMIT) % STEP - PRIORITY_LIMIT
    except ValueError:
        return 0


def choose(
    catalogue: Catalogue,
    count: int,
    held: Mapping[str, int],
    find_limit: Callable[[str], float],
    except_for: Set[tuple[str, int]],
    is_rotating: bool = False,
    has_no_variants: bool = False,
) -> list[Pending]:
    """Up to `count` pending images: tenants take turns, and each offers its first in line.

    Args:
        catalogue: knows the images; the other arguments of its `list_pending` are passed on.
        count: how many at most.
        held: how many images of each tenant are in runs.
        find_limit: how many of a tenant's images may be in runs at once.
        except_for: (ID, generation) pairs to leave out.
        is_rotating: see `list_pending`.
        has_no_variants: see `list_pending`.
    """
    counts = Counter(held)
    limits = {tenant: find_limit(tenant) for tenant in catalogue.list_waiting_tenants()}
    tenants = [tenant for tenant, limit in limits.items() if counts[tenant] < limit]
    random.shuffle(tenants)  # so that none of many is always last
    tenants.sort(key=lambda tenant: counts[tenant])
    lines = {
        tenant: deque(
            catalogue.list_pending(count, except_for, is_rotating, has_no_variants, tenant)
        )
        for tenant in tenants[:count]
    }
    chosen: list[Pending] = []
    while len(chosen) < count:
        offering = [one for one in lines if lines[one] and counts[one] < limits[one]]
        if not offering:
            break
        tenant = min(offering, key=lambda one: counts[one])
        chosen.append(lines[tenant].popleft())
        counts[tenant] += 1
    return chosen
