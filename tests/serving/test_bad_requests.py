"""What cannot be served is an error of that request by name, and the others go on. Run: pytest tests/serving"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from moa.errors import BackendError, CheckpointError, ContextError
from moa.serving.pool import AdapterPool
from moa.serving.vllm.registration import check_version
from tests import models

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
KINDS: dict[str, Any] = {
    "good": {"r": 2, "target_modules": ["q_proj"]},
    "wide": {"r": 9, "target_modules": ["q_proj"]},
    "mlp": {"r": 2, "target_modules": ["q_proj", "up_proj"]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for name, options in KINDS.items():
        config = LoraConfig(**options, init_lora_weights=False)
        get_peft_model(models.llama(), config).save_pretrained(root / name)
    wider = models.llama(hidden_size=32)
    get_peft_model(wider, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(root / "foreign")
    return {name: root / name for name in (*KINDS, "foreign")}


def asked(pool: AdapterPool, name: str | None) -> torch.Tensor:
    found: torch.Tensor = pool(input_ids=torch.tensor([[5, 6, 7]]), adapter_ids=[name]).logits
    return found


def test_an_adapter_of_another_base(folders: dict[str, Path]) -> None:
    pool = AdapterPool(models.llama(), 10**6)
    pool.add("good", folders["good"])
    before = asked(pool, "good")
    with pytest.raises(CheckpointError, match="foreign was made on another base"):
        pool.add("foreign", folders["foreign"])
    assert torch.equal(asked(pool, "good"), before) and pool.names == ["good"]


def test_an_adapter_whose_rank_passes_the_pools(folders: dict[str, Path]) -> None:
    pool = AdapterPool(models.llama(), 10**6, max_rank=8)
    with pytest.raises(CheckpointError, match=r"has rank 9 on .*this pool takes up to 8"):
        pool.add("wide", folders["wide"])
    pool.add("good", folders["good"])
    asked(pool, "good")


def test_a_request_for_an_adapter_that_was_removed_in_flight(folders: dict[str, Path]) -> None:
    pool = AdapterPool(models.llama(), 10**6)
    for name in ("good", "mlp"):
        pool.add(name, folders[name])
    before = asked(pool, "mlp")
    with pool.lease("good"):  # a request that runs
        pool.remove("good")
        with pytest.raises(ContextError, match=r"unknown adapter 'good'.*removed"):
            asked(pool, "good")
        assert torch.equal(asked(pool, "mlp"), before)
    asked(pool, None)


def test_a_full_pool_with_everything_pinned(folders: dict[str, Path]) -> None:
    room = AdapterPool(models.llama(), 10**6)
    for name in ("good", "mlp"):
        room.add(name, folders[name])
    pool = AdapterPool(models.llama(), max(host.n_bytes for host in room._hosts.values()))
    for name in ("good", "mlp"):
        pool.add(name, folders[name])
    with pool.lease("mlp"):
        with pytest.raises(BackendError, match=r"no room for adapter 'good'.*what runs is pinned"):
            asked(pool, "good")
        assert torch.equal(asked(pool, "mlp"), asked(room, "mlp"))
    assert torch.equal(asked(pool, "good"), asked(room, "good"))


def test_a_base_whose_kernel_hides_a_layers_input(folders: dict[str, Path]) -> None:
    """As fused and quantised kernels do: they read the weight and never call the layer."""
    pool = AdapterPool(models.llama(), 10**6)
    for name in ("good", "mlp"):
        pool.add(name, folders[name])
    before = asked(pool, "good")
    for module in pool.model.modules():
        if type(module).__name__ == "LlamaMLP":
            inner: Any = module

            def fused(x: torch.Tensor, m: Any = inner) -> torch.Tensor:
                return m.down_proj(m.act_fn(m.gate_proj(x)) * F.linear(x, m.up_proj.weight))

            inner.forward = fused
    with pytest.raises(BackendError, match=r"never called model.layers.0.mlp.up_proj, so adapter 'mlp' could not act"):
        asked(pool, "mlp")
    assert torch.equal(asked(pool, "good"), before)
    asked(pool, None)


@pytest.mark.parametrize("found", ["0.31.2", "0.320.0", "1.0", None])
def test_an_engine_of_a_version_that_is_not_known(found: str | None) -> None:
    with pytest.raises(BackendError, match=rf"knows versions 0\.32 and found {found or 'none'}"):
        check_version(found)
    check_version("0.32.7")
