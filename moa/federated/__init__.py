"""Adapters and mixtures that many clients train: how the server makes one of them."""

from .aggregate import Aggregation, aggregate
from .aggregators import AGGREGATORS, Aggregated, Aggregator, Factors, aggregator
from .update import Update, prepare, update_of

__all__ = [
    "AGGREGATORS",
    "Aggregated",
    "Aggregation",
    "Aggregator",
    "Factors",
    "Update",
    "aggregate",
    "aggregator",
    "prepare",
    "update_of",
]
