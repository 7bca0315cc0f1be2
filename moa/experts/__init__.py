"""Expert banks: the adapter families. `BANKS` names them for `expert=`."""

from .affine import AffineLoRABank
from .bank import ExpertBank
from .headed import HeadedLoRABank
from .lora import LoRABank
from .shared import SharedLoRABank
from .slots import SlotBank
from .vector import VectorBank

BANKS: dict[str, type[ExpertBank]] = {
    "lora": LoRABank,
    "headed": HeadedLoRABank,
    "affine": AffineLoRABank,
    "shared": SharedLoRABank,
}

__all__ = [
    "BANKS",
    "AffineLoRABank",
    "ExpertBank",
    "HeadedLoRABank",
    "LoRABank",
    "SharedLoRABank",
    "SlotBank",
    "VectorBank",
]
