"""The models of `experiments.family_figures`: one family alone and behind a router, and peft's layers in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import moa
from moa.experts import FAMILIES, make_family
from moa.layers import Site

RANK, N_EXPERTS, K, N_TASKS = 8, 8, 2, 4
WHOLE = ("boft", "dora", "oft")  # whole weights of their layer: the rows of an example share a routing
BLOCK_SIZE = 8  # of rotations


@dataclass(frozen=True)
class Shape:
    """A kind of model that families are measured on.

    Args:
        make: folder or None, blocks -> the model; without a folder its weights are random.
        linears: endings of the names of its layers.
        narrow: those of them at the end of a feed-forward block, whose input (IA)³ scales.
        batch: examples.
        length: tokens of each.
        decodes: whether it is causal.
    """

    make: Callable[[str | None, int], Any]
    linears: tuple[str, ...]
    narrow: tuple[str, ...]
    batch: int
    length: int
    decodes: bool


def encoder(folder: str | None, blocks: int) -> Any:
    """Return the first blocks of all-MiniLM-L6-v2, of the one in a folder or of its shape."""
    sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "use_cache": False}
    return _body(folder, blocks, lambda: transformers.BertConfig(num_hidden_layers=blocks, **sizes))


def decoder(folder: str | None, blocks: int) -> Any:
    """Return the first blocks of SmolLM2-135M, of the one in a folder or of its shape."""
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    options = {"vocab_size": 49152, "pad_token_id": 0, "eos_token_id": None, **sizes}
    return _body(folder, blocks, lambda: transformers.LlamaConfig(num_hidden_layers=blocks, **options))


def _body(folder: str | None, blocks: int, config: Callable[[], Any]) -> Any:
    """Return a model without a head, whose cost would hide that of the blocks where these are few."""
    torch.manual_seed(0)
    if folder is None:
        return transformers.AutoModel.from_config(config())
    return transformers.AutoModel.from_pretrained(folder, num_hidden_layers=blocks, dtype=torch.float32)


BERT_LINEARS = ("query", "key", "value", "intermediate.dense", "output.dense")
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES = {
    "MiniLM": Shape(encoder, BERT_LINEARS, ("output.dense",), 16, 32, decodes=False),
    "SmolLM2": Shape(decoder, LLAMA_LINEARS, ("down_proj",), 2, 64, decodes=True),
}


def keywords(name: str, shape: Shape) -> dict[str, Any]:
    """Return the keywords of a family beside those of the recipe, the same as peft's below."""
    options: dict[str, Any] = {"expert": name}
    if FAMILIES[name].places[0] in ("input", "output"):
        options["targets"] = list(shape.linears)
    if "rank" in FAMILIES[name].uses:
        options["rank"] = RANK
    if name in ("oft", "boft"):
        options["block_size"] = BLOCK_SIZE
    if name == "ia3":
        options["feedforward"] = shape.narrow
    return options


def alone(base: Any, name: str, shape: Shape) -> Any:
    """Return the model with one expert of a family on every layer."""
    return moa.build(base, "fixed", n_experts=1, **keywords(name, shape))


def routed(base: Any, name: str, shape: Shape) -> Any:
    """Return the model with 8 experts of a family on every layer, 2 of them a row, or all by task for whole weights."""
    if name in WHOLE:
        return moa.build(base, "moelora", n_experts=N_EXPERTS, n_tasks=N_TASKS, **keywords(name, shape))
    return moa.build(base, "topk", n_experts=N_EXPERTS, k=K, **keywords(name, shape))


def bank(name: str, n_experts: int, d: int) -> Any:
    """Return a bank of a family on a linear layer of d features, by itself."""
    own = {"block_size": BLOCK_SIZE} if name in ("oft", "boft") else {}
    family = make_family(name, own)
    place = family.places[0]
    site = Site("layer", nn.Linear(d, d), d, d, place=place)
    options = {"rank": RANK, "scaling": 1.0, "dropout": 0.0, "engine": None}
    return family.build(site, n_experts, family.shared([site], **options), **options)


# ------------------------------------------------------------------------------------------------ peft's


def peft_config(name: str, shape: Shape) -> Any:
    """Return peft's configuration of a family, or None where peft has none."""
    common: dict[str, Any] = {"target_modules": list(shape.linears)}
    makers: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, **common),
        "dora": lambda: peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, use_dora=True, **common),
        "ia3": lambda: peft.IA3Config(feedforward_modules=list(shape.narrow), **common),
        "vera": lambda: peft.VeraConfig(r=RANK, save_projection=False, **common),
        "shira": lambda: peft.ShiraConfig(r=RANK, random_seed=0, **common),
        "lokr": lambda: peft.LoKrConfig(r=RANK, alpha=2 * RANK, **common),
        "loha": lambda: peft.LoHaConfig(r=RANK, alpha=2 * RANK, **common),
        "randlora": lambda: peft.RandLoraConfig(r=RANK, randlora_alpha=20 * RANK, save_projection=False, **common),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=BLOCK_SIZE, **common),
        "boft": lambda: peft.BOFTConfig(boft_block_size=BLOCK_SIZE, **common),
    }
    return makers[name]() if name in makers else None


def peft_alone(base: Any, name: str, shape: Shape) -> Any:
    """Return peft's own model of the family."""
    return peft.get_peft_model(base, peft_config(name, shape))


class Loop(nn.Module):
    """Experts behind a gate as one writes them with peft: its layer, once for each adapter, on the rows that chose it.

    Each of peft's layers adds to its base; the weights of a row sum to 1, so that the base counts once.

    Args:
        layer: peft's, with the adapters "0" to "7".
        d_in: i.
        by_task: all adapters, weighted by task, in place of 2 a row.
    """

    def __init__(self, layer: Any, d_in: int, by_task: bool) -> None:
        super().__init__()
        self.layer = layer
        self.gate = nn.Linear(d_in, N_EXPERTS, bias=False)
        self.by_task = nn.Parameter(torch.zeros(N_TASKS, N_EXPERTS)) if by_task else None

    def forward(self, x: Tensor) -> Tensor:
        """Return Σ_e w_e layer_e(x), (B, S, o) of x (B, S, i)."""
        if self.by_task is not None:
            weights = self.by_task[torch.arange(len(x)) % N_TASKS].softmax(-1)  # (B, E)
            return sum(self.adapted(x, e) * weights[:, e, None, None] for e in range(N_EXPERTS))  # type: ignore[return-value]
        kept, indices = self.gate(x).topk(K, -1)
        weights, flat = kept.softmax(-1).flatten(0, 1), x.flatten(0, 1)
        y: Tensor | None = None
        for e in range(N_EXPERTS):
            rows, slots = (indices.flatten(0, 1) == e).nonzero(as_tuple=True)
            out = self.adapted(flat[None, rows], e)[0] * weights[rows, slots, None]
            y = out.new_zeros(len(flat), out.shape[-1]) if y is None else y
            y = y.index_add(0, rows, out)
        assert y is not None
        return y.view(*x.shape[:-1], -1)

    def adapted(self, x: Tensor, expert: int) -> Tensor:
        """Return peft's layer with one adapter, (B, S, o) of x (B, S, i)."""
        self.layer._active_adapter = [str(expert)]  # set_adapter would freeze the others
        out: Tensor = self.layer(x)
        return out


def peft_loop(base: Any, name: str, shape: Shape) -> Any:
    """Return the model with a `Loop` over peft's layers on every layer, all adapters trained."""
    model = peft.get_peft_model(base, peft_config(name, shape), adapter_name="0")
    for e in range(1, N_EXPERTS):
        model.add_adapter(str(e), peft_config(name, shape))
    tuned = [(path, m) for path, m in base.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    for path, layer in tuned:
        parent, _, last = path.rpartition(".")
        for key, parameter in layer.named_parameters():
            own = key.startswith(tuple(layer.adapter_layer_names))
            parameter.requires_grad_(own)
        loop = Loop(layer, layer.get_base_layer().in_features, name in WHOLE)
        setattr(base.get_submodule(parent), last, loop)
    return model
