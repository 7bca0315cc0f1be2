"""Expert banks: the adapter families. `BANKS` names them for `expert=`."""

from .base import ExpertBank
from .lora import LoRABank
from .vector import VectorBank

BANKS: dict[str, type[ExpertBank]] = {"lora": LoRABank}

__all__ = ["BANKS", "ExpertBank", "LoRABank", "VectorBank"]
