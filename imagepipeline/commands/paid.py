"""Commands about paid calls: costs, rate limit."""

from datetime import UTC, datetime

import click

from imagepipeline.commands.shared import (
    EPILOG,
    json_option,
    say,
    to_text,
    with_settings,
)
from imagepipeline.errors import SettingsError
from imagepipeline.opening import open_catalogue
from imagepipeline.settings import Settings
from imagepipeline.text import to_json


@click.command(epilog=EPILOG)
@click.option(
    "--by",
    type=click.Choice(["model", "stage", "day", "tenant"]),
    default="model",
    show_default=True,
)
@click.option(
    "--since", type=click.DateTime(["%Y-%m-%d"]), help="Only calls on or after this day (UTC)."
)
@json_option
@with_settings
def costs(settings: Settings, by: str, since: datetime | None, as_json: bool) -> None:
    """Show what paid calls cost in US dollars, as reported or by IMAGEPIPELINE_PRICES.

    `calls` includes failed ones; `unpriced` counts those of unknown cost.
    """
    from imagepipeline import display
    from imagepipeline.stores.ledger import Ledger

    open_catalogue(settings)
    rows = Ledger(settings.database_url).summarize(by, since.replace(tzinfo=UTC) if since else None)
    rows = [
        row | {"cost_usd": round(row["cost_usd"], 6) if as_json else f"{row['cost_usd']:.6f}"}
        for row in rows
    ]
    display.show_rows(
        rows, (by, "calls", "answered", "tokens_in", "tokens_out", "cost_usd", "unpriced"), as_json
    )


@click.command(epilog=EPILOG)
@click.argument("rate", required=False, type=to_text)
@click.option("--reset", is_flag=True, help="Return to IMAGEPIPELINE_RATE_LIMIT.")
@json_option
@with_settings
def limit(settings: Settings, rate: str | None, reset: bool, as_json: bool) -> None:
    """Show or change the RATE limit of paid calls, at once and for all processes: 20/minute, off.

    `metadata=10/minute,embedding=100/minute` sets one for each stage. It is kept in Redis until
    `--reset`.
    """
    from imagepipeline.providers import open_limiter
    from imagepipeline.rates import parse_limits

    if rate is not None and reset:
        raise click.UsageError("give a RATE, or --reset")
    try:
        parse_limits(rate or "off")
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    with open_limiter(settings) as limiter:
        if rate is not None or reset:
            limiter.set_limits(None if reset else rate)
        text = limiter.get_limits()
    say(to_json({"rate_limit": text}) if as_json else text)
