"""Tenants: customers whose uploads share a stack, what each may use, and what it has used."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from imagepipeline.models import NO_TENANTS, Status, TenantSet, now_utc
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.ledger import Ledger

OTHERS = "*"
KNOWN_SECONDS = 1.0


class Tenants:
    """What tenants may use. Images without a tenant have no limit of their own.

    Args:
        catalogue: counts their images.
        ledger: knows what their calls cost.
        max_runs: how many images of a tenant may be in runs at once; `*` for all others.
        daily_budgets_usd: US dollars a day (UTC); `*` for all others.
        clock: gives the time.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        ledger: Ledger,
        max_runs: Mapping[str, int],
        daily_budgets_usd: Mapping[str, float],
        clock: Callable[[], datetime] = now_utc,
    ) -> None:
        self._catalogue = catalogue
        self._ledger = ledger
        self._max_runs = max_runs
        self._daily_budgets_usd = daily_budgets_usd
        self._clock = clock
        self._spent = NO_TENANTS
        self._known_until = 0.0

    @property
    def has_budgets(self) -> bool:
        """Whether paid work of a tenant may have to wait while that of others goes on."""
        return bool(self._daily_budgets_usd)

    def find_max_runs(self, tenant: str) -> float:
        """How many of its images may be in runs at once."""
        limit = _find_share(self._max_runs, tenant)
        return math.inf if limit is None else limit

    def find_max_paid_runs(self, tenant: str) -> float:
        """How many of its images may be in runs that make paid calls: none without a budget.

        What is spent was looked up for all tenants at once, a second ago at most; each paid call
        looks again.
        """
        if time.monotonic() >= self._known_until:
            self._spent = self.find_spent()
            self._known_until = time.monotonic() + KNOWN_SECONDS
        return 0 if tenant in self._spent else self.find_max_runs(tenant)

    def explain_spent(self, tenant: str) -> str | None:
        """Why its paid work must wait, as a sentence; None if today's budget is not used up."""
        budget_usd = self._find_budget_usd(tenant)
        if math.isinf(budget_usd):
            return None
        spent_usd = self._ledger.sum_cost_usd(self._find_midnight(), tenant)
        if spent_usd < budget_usd:
            return None
        return (
            f"the daily budget of {budget_usd:g} USD of the tenant {tenant} is used up "
            f"({spent_usd:.2f} USD): its paid work resumes at midnight UTC"
        )

    def find_spent(self) -> TenantSet:
        """The tenants whose paid work must wait until midnight UTC.

        A budget of 0 is used up before the first call, also that of tenants nobody knows yet.
        """
        if not self.has_budgets:
            return NO_TENANTS
        calls = self._ledger.summarize("tenant", self._find_midnight())
        costs = Counter({row["tenant"]: row["cost_usd"] for row in calls})
        names = {*costs, *self._daily_budgets_usd} - {"", OTHERS}
        spent = frozenset(name for name in names if costs[name] >= self._find_budget_usd(name))
        if self._daily_budgets_usd.get(OTHERS) == 0:
            return TenantSet(frozenset(names) - spent, is_all_but=True)
        return TenantSet(spent)

    def list_used(self) -> list[dict[str, Any]]:
        """A row for each tenant with images that have not completed, or with paid calls today.

        Its keys are `tenant`, `pending`, `processing`, `failed`, `max_runs`, `cost_today_usd` and
        `daily_budget_usd`. Nothing is listed while no image has a tenant.
        """
        counts = {
            status: self._catalogue.count_by_tenant(status)
            for status in (Status.PENDING, Status.PROCESSING, Status.FAILED)
        }
        calls = self._ledger.summarize("tenant", self._find_midnight())
        costs = {row["tenant"]: row["cost_usd"] for row in calls}
        names = set(costs).union(*counts.values())
        if not any(names):
            return []
        return [
            {
                "tenant": tenant,
                **{status.value: found.get(tenant, 0) for status, found in counts.items()},
                "max_runs": _find_share(self._max_runs, tenant),
                "cost_today_usd": round(costs.get(tenant, 0), 6),
                "daily_budget_usd": _find_share(self._daily_budgets_usd, tenant),
            }
            for tenant in sorted(names)
        ]

    def _find_budget_usd(self, tenant: str) -> float:
        budget_usd = _find_share(self._daily_budgets_usd, tenant)
        return math.inf if budget_usd is None else budget_usd

    def _find_midnight(self) -> datetime:
        return self._clock().replace(hour=0, minute=0, second=0, microsecond=0)


def describe_used(row: Mapping[str, Any]) -> str:
    """A row of `Tenants.list_used` in words."""
    counts = [f"{row[name]:,} {name}" for name in ("pending", "processing", "failed")]
    budget = row["daily_budget_usd"]
    of_budget = "" if budget is None else f" of {budget:g}"
    return ", ".join([*counts, f"{row['cost_today_usd']:.4g}{of_budget} USD today"])


def _find_share(shares: Mapping[str, float], tenant: str) -> float | None:
    """A tenant's share, or that of all others; None if there is none, or no tenant."""
    return shares.get(tenant, shares.get(OTHERS)) if tenant else None
