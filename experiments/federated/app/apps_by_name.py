"""The two apps under the names that pyproject.toml gives Flower."""

from experiments.federated.apps import client_side as client
from experiments.federated.apps import server_side as server

__all__ = ["client", "server"]
