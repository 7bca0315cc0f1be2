"""Adapters and mixtures that many clients train: how the server makes one of them."""

from .aggregate import aggregate_states, upload_bytes
from .aggregators import AGGREGATORS, Aggregated, Aggregator, aggregator

__all__ = ["AGGREGATORS", "Aggregated", "Aggregator", "aggregate_states", "aggregator", "upload_bytes"]
