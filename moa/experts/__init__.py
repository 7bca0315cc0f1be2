"""Expert banks and the table of adapter families: importing this package fills `FAMILIES`."""

from . import families as families
from .affine import Affine, AffineLoRABank
from .bank import ExpertBank
from .factored import FactoredBank
from .family import FAMILIES, Family, family_class, make_family, register_expert
from .fused import Fused
from .headed import Headed, HeadedLoRABank
from .lora import LoRA, LoRABank
from .mixed import Mixed
from .mixed_bank import MixedBank, MixedFactorsBank
from .shared import Shared, SharedLoRABank
from .slots import SlotBank
from .structured import StructuredBank
from .vector import VectorBank

__all__ = [
    "FAMILIES",
    "Affine",
    "AffineLoRABank",
    "ExpertBank",
    "FactoredBank",
    "Family",
    "Fused",
    "Headed",
    "HeadedLoRABank",
    "LoRA",
    "LoRABank",
    "Mixed",
    "MixedBank",
    "MixedFactorsBank",
    "Shared",
    "SharedLoRABank",
    "SlotBank",
    "StructuredBank",
    "VectorBank",
    "family_class",
    "make_family",
    "register_expert",
]
