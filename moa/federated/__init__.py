"""Adapters and mixtures that many clients train: how the server makes one of them."""

from .aggregate import Aggregation, aggregate
from .aggregators import AGGREGATORS, Aggregated, Aggregator, Factors, aggregator
from .alternate import Alternation
from .client import received, reply_of
from .importance import RankPlan, allocate_ranks
from .private import Spent, train_privately
from .screening import Reply, Screen
from .server import Download, Round, Server
from .update import Update, prepare, update_of

__all__ = [
    "AGGREGATORS",
    "Aggregated",
    "Aggregation",
    "Aggregator",
    "Alternation",
    "Download",
    "Factors",
    "RankPlan",
    "Reply",
    "Round",
    "Screen",
    "Server",
    "Spent",
    "Update",
    "aggregate",
    "aggregator",
    "allocate_ranks",
    "prepare",
    "received",
    "reply_of",
    "train_privately",
    "update_of",
]
