"""Families beyond LoRA's, one file each: importing this package fills `FAMILIES` with them."""

from .boft import BOFT, BOFTBank
from .bottleneck import Bottleneck, BottleneckBank
from .comp_lora import CompLoRA, CompLoRABank
from .compacter import Compacter, CompacterBank
from .convolved import Conformer, ConformerBank, Convpass, ConvpassBank
from .core import Core, CoreBank
from .dora import DoRA, DoRABank
from .dylora import DyLoRA, DyLoRABank
from .hypelora import HypeLoRA, HypeLoRABank, Hypernetwork
from .ia3 import IA3, InputScaleBank, OutputScaleBank
from .loha import LoHa, LoHaBank
from .lokr import LoKr, LoKrBank
from .loldu import LoLDU, LoLDUBank
from .mps import MPS, MPSBank
from .oft import OFT, OFTBank
from .paca import PaCA, PaCABank
from .qwha import QWHA, QWHABank
from .randlora import RandLoRA, RandLoRABank
from .salt import SALT, SALTBank
from .shira import ShiRA, ShiRABank
from .soka import SoKA, SoKABank
from .tera import TeRA, TeRABank
from .vera import VeRA, VeRABank

__all__ = [
    "BOFT",
    "IA3",
    "MPS",
    "OFT",
    "QWHA",
    "SALT",
    "BOFTBank",
    "Bottleneck",
    "BottleneckBank",
    "CompLoRA",
    "CompLoRABank",
    "Compacter",
    "CompacterBank",
    "Conformer",
    "ConformerBank",
    "Convpass",
    "ConvpassBank",
    "Core",
    "CoreBank",
    "DoRA",
    "DoRABank",
    "DyLoRA",
    "DyLoRABank",
    "HypeLoRA",
    "HypeLoRABank",
    "Hypernetwork",
    "InputScaleBank",
    "LoHa",
    "LoHaBank",
    "LoKr",
    "LoKrBank",
    "LoLDU",
    "LoLDUBank",
    "MPSBank",
    "OFTBank",
    "OutputScaleBank",
    "PaCA",
    "PaCABank",
    "QWHABank",
    "RandLoRA",
    "RandLoRABank",
    "SALTBank",
    "ShiRA",
    "ShiRABank",
    "SoKA",
    "SoKABank",
    "TeRA",
    "TeRABank",
    "VeRA",
    "VeRABank",
]
