"""Filters as conditions in SQL, the same on SQLite and Postgres."""

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from imagepipeline.filters import Condition, Filter
from imagepipeline.models import TenantSet
from imagepipeline.stores.tables import images


def build_conditions(where: Filter, is_postgres: bool) -> list[sa.ColumnElement[bool]]:
    """Conditions on the table `images`, which must all hold."""
    return [_build(condition, is_postgres) for condition in where.conditions]


def leave_out(tenants: TenantSet) -> sa.ColumnElement[bool]:
    """A condition on the table `images`: they are of none of these tenants."""
    if tenants.is_all_but:
        return images.c.tenant.in_({"", *tenants.names})
    return images.c.tenant.not_in(tenants.names) if tenants else sa.true()


def _build(condition: Condition, is_postgres: bool) -> sa.ColumnElement[bool]:
    field, _, bound = condition.field.partition("-")
    if bound:
        column: sa.ColumnElement[datetime] = images.c[f"{field}_at"]
        return column >= condition.time if bound == "since" else column < condition.time
    if field == "id":
        return _match_id(condition.value)
    if field == "tag":
        return _has_tag(condition.value, is_postgres)
    if field == "category":
        category: sa.ColumnElement[str] = images.c.metadata["category"].as_string()
        return category == condition.value
    return images.c.status == condition.value


def _match_id(value: str) -> sa.ColumnElement[bool]:
    if not value.endswith("*"):
        return images.c.id == value
    start = value.removesuffix("*")
    # Not LIKE, which ignores case on SQLite; nor a range, which depends on the collation.
    return sa.func.substr(images.c.id, 1, len(start)) == start


def _has_tag(tag: str, is_postgres: bool) -> sa.ColumnElement[bool]:
    tags = images.c.metadata["tags"]
    if is_postgres:
        return sa.type_coerce(sa.cast(tags, JSONB).has_key(tag), sa.Boolean)
    found = sa.func.json_each(images.c.metadata, "$.tags").table_valued("value")
    return sa.exists(sa.select(found.c.value).where(found.c.value == tag))
