"""Adapters and mixtures that many clients train: how the server makes one of them."""

from .aggregate import Aggregation, aggregate
from .aggregators import AGGREGATORS, Aggregated, Aggregator, Factors, aggregator
from .client import received, reply_of
from .screening import Reply, Screen
from .server import Download, Round, Server
from .update import Update, prepare, update_of

__all__ = [
    "AGGREGATORS",
    "Aggregated",
    "Aggregation",
    "Aggregator",
    "Download",
    "Factors",
    "Reply",
    "Round",
    "Screen",
    "Server",
    "Update",
    "aggregate",
    "aggregator",
    "prepare",
    "received",
    "reply_of",
    "update_of",
]
