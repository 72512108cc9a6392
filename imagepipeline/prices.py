"""Prices of models in US dollars, and what to do if they are unknown."""

import json
import re
from collections.abc import Mapping, Sequence

FREE = (0, 0)  # a price
MAX_USD = 1_000_000  # of a budget, and of the price of a million tokens
# Providers append a date to a model's name to denote a version, whose price is the same.
DATE = re.compile(r"[-@:](\d{4}-\d{2}-\d{2}|\d{8})$")


def find_price(model: str, prices: Mapping[str, tuple[float, float]]) -> tuple[float, float] | None:
    """Returns the US dollars per million tokens in and out, or None if they are unknown.

    A dated version of a model has the price of the model.
    """
    return prices.get(model, prices.get(DATE.sub("", model)))


def explain_unpriced(models: Sequence[str]) -> str:
    """Returns what to do if a budget is set but the prices of these models are unknown."""
    entries = ", ".join(f"{json.dumps(model)}: [IN, OUT]" for model in models)
    return (
        f"a budget is set, but the price of {' and '.join(models)} is unknown: "
        f"set IMAGEPIPELINE_PRICES to {{{entries}}} in USD per million tokens "
        "([0, 0] if it is free), or unset the budget, and restart"
    )


def explain_missing_usage(model: str) -> str:
    """Returns what to do if a budget is set but the provider does not report a call's usage."""
    return (
        f"a budget is set, but calls to {model} do not report their usage: "
        f"set IMAGEPIPELINE_PRICES to {{{json.dumps(model)}: [0, 0]}} if it is free, "
        "or unset the budget, and restart"
    )
