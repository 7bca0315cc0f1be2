"""Expert banks: the adapter families. `BANKS` names them for `expert=`."""

from .base import ExpertBank
from .headed import HeadedLoRABank
from .lora import LoRABank
from .vector import VectorBank

BANKS: dict[str, type[ExpertBank]] = {"lora": LoRABank, "headed": HeadedLoRABank}

__all__ = ["BANKS", "ExpertBank", "HeadedLoRABank", "LoRABank", "VectorBank"]
