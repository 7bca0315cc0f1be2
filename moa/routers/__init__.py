"""Routers: who decides which experts act on a row. `ROUTERS` names the classes."""

from .choice import ExpertChoiceRouter, SoftRouter
from .first_pass import Classifier, PreviewRouter
from .fixed import FixedRouter
from .identity import IdRouter
from .linear import LinearRouter
from .localized import LocalizedRouter
from .projection import ProjectionRouter
from .prototype import PrototypeRouter
from .ranked import RankedRouter
from .router import Router
from .sampled import SampledRouter
from .table import TableRouter, TaskEmbeddingRouter
from .threshold import ThresholdRouter

ROUTERS: dict[str, type[Router]] = {
    "linear": LinearRouter,
    "sampled": SampledRouter,
    "fixed": FixedRouter,
    "ranked": RankedRouter,
    "projection": ProjectionRouter,
    "prototype": PrototypeRouter,
    "localized": LocalizedRouter,
    "threshold": ThresholdRouter,
    "expert_choice": ExpertChoiceRouter,
    "soft": SoftRouter,
    "table": TableRouter,
    "task_embedding": TaskEmbeddingRouter,
}

__all__ = [
    "ROUTERS",
    "Classifier",
    "ExpertChoiceRouter",
    "FixedRouter",
    "IdRouter",
    "LinearRouter",
    "LocalizedRouter",
    "PreviewRouter",
    "ProjectionRouter",
    "PrototypeRouter",
    "RankedRouter",
    "Router",
    "SampledRouter",
    "SoftRouter",
    "TableRouter",
    "TaskEmbeddingRouter",
    "ThresholdRouter",
]
