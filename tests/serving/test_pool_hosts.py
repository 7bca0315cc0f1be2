"""The pool's other kinds of adapters: few bits on the host, SHiRA, and loading ahead. Oracle: peft."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model

from moa.errors import CheckpointError, ConfigError, ContextError
from moa.merge.codec import coded_bytes, encode
from moa.serving.pool import AdapterPool
from tests import models

pytestmark = pytest.mark.filterwarnings(  # both are peft's
    "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:Sparse invariant checks:UserWarning"
)
TARGETS = ["q_proj", "k_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False),
    "other": LoraConfig(r=5, target_modules=["q_proj"], init_lora_weights=False),
    "shira": ShiraConfig(r=2, target_modules=TARGETS, init_weights=False, random_seed=1),
    "shira2": ShiraConfig(r=1, target_modules=TARGETS, init_weights=False, random_seed=2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        base = models.llama()
        torch.manual_seed(seed)
        get_peft_model(base, config).save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


def pool_of(folders: dict[str, Path], *names: str, capacity: int = 10**6, **options: Any) -> AdapterPool:
    pool = AdapterPool(models.llama(), capacity, **options)
    for name in names:
        pool.add(name, folders[name])
    return pool


def batch(rows: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, models.VOCAB, (rows, 5), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def by_peft(folder: Path) -> Any:
    return PeftModel.from_pretrained(models.llama(), folder).eval()


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**options).logits
        return found


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_few_bits_on_the_host_are_the_codecs(folders: dict[str, Path], bits: int) -> None:
    pool = pool_of(folders, "lora", host_bits=bits)
    reference, plain = by_peft(folders["lora"]), logits(by_peft(folders["lora"]), **batch())
    sizes = []
    for name, parameter in reference.named_parameters():
        if "lora_" in name:
            parameter.data = encode(parameter.data, bits).decode()
            sizes.append(parameter.numel())
    found = logits(pool, **batch(), adapter_ids=["lora"] * 3)
    torch.testing.assert_close(found, logits(reference, **batch()), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-4), "nothing was coded"
    (host,) = pool._hosts.values()
    assert host.host_bytes == sum(coded_bytes(n, bits) for n in sizes)
    assert host.n_bytes == pool.cache.used == 4 * sum(sizes)


@pytest.mark.parametrize("host_bits", [None, 1])
def test_evicted_and_reloaded_is_the_same_bit_for_bit(folders: dict[str, Path], host_bits: int | None) -> None:
    largest = max(host.n_bytes for host in pool_of(folders, *CONFIGS)._hosts.values())
    pool = pool_of(folders, *CONFIGS, capacity=largest, host_bits=host_bits)
    first = {name: logits(pool, **batch(), adapter_ids=[name, None, name]) for name in CONFIGS}
    loads = pool.cache.loads
    for name in CONFIGS:
        assert torch.equal(logits(pool, **batch(), adapter_ids=[name, None, name]), first[name])
        assert pool.cache.used <= largest
    assert pool.cache.loads > loads, "nothing was evicted"


def test_shira_beside_others_and_by_itself_is_that_of_peft(folders: dict[str, Path]) -> None:
    pool = pool_of(folders, *CONFIGS)
    asked = ["shira", "lora", None, "shira2", "shira"]
    mixed = logits(pool, **batch(5), adapter_ids=asked)
    before = {name: value.clone() for name, value in pool.model.state_dict().items()}
    for name in ("shira", "shira2"):
        reference, rows = by_peft(folders[name]), [n for n, one in enumerate(asked) if one == name]
        truth = logits(reference, **batch(5))
        torch.testing.assert_close(mixed[rows], truth[rows], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits(pool, **batch(5), adapter_ids=[name] * 5), truth, rtol=1e-5, atol=1e-5)
        ask = {**batch(5), "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(pool.generate(**ask, adapter_ids=[name] * 5), reference.generate(**ask))
        assert (truth - mixed)[[n for n, one in enumerate(asked) if one != name]].abs().max() > 1e-3
    with pytest.raises(RuntimeError):
        pool(input_ids=torch.zeros(1, 1), adapter_ids=["shira"])  # numbers that are no tokens
    for name, value in pool.model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} is not as it came"


def test_a_batch_of_only_one_shira_runs_in_the_weights(folders: dict[str, Path]) -> None:
    pool = pool_of(folders, "shira")
    layer: Any = pool.model.get_submodule("model.layers.0.self_attn.q_proj")
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(module.weight.clone()))
    alone = logits(pool, **batch(), adapter_ids=["shira"] * 3)
    mixed = logits(pool, **batch(), adapter_ids=["shira", "shira", None])
    written, plain = seen
    assert torch.equal(layer.weight, plain) and (written != plain).sum() == CONFIGS["shira"].r * sum(plain.shape)
    torch.testing.assert_close(mixed[:2], alone[:2], rtol=1e-5, atol=1e-5)


def test_other_threads_never_see_the_written_weights(folders: dict[str, Path]) -> None:
    pool = pool_of(folders, "shira", "lora")
    truth = {name: logits(pool, **batch(), adapter_ids=[name] * 3) for name in ("shira", "lora", None)}
    wrong: list[str | None] = []

    def serve(name: str | None) -> None:
        for _ in range(25):
            if not torch.equal(logits(pool, **batch(), adapter_ids=[name] * 3), truth[name]):
                wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in truth]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_loading_ahead(folders: dict[str, Path]) -> None:
    pool = pool_of(folders, *CONFIGS)
    truth = logits(pool_of(folders, *CONFIGS), **batch(2), adapter_ids=["lora", "shira"])
    pool.prefetch(["lora", "shira"])
    pool.cache.close()  # waits for what was asked
    assert pool.cache.loads == 2 and pool.cache.used > 0
    assert torch.equal(logits(pool, **batch(2), adapter_ids=["lora", "shira"]), truth)
    assert pool.cache.loads == 2, "it was here already"
    with pytest.raises(ContextError, match="unknown adapter 'none'"):
        pool.prefetch(["none"])
    pool.close()


def test_loading_ahead_takes_nothing_from_what_runs(folders: dict[str, Path]) -> None:
    sizes = {name: host.n_bytes for name, host in pool_of(folders, *CONFIGS)._hosts.items()}
    pool = pool_of(folders, "lora", "other", capacity=max(sizes["lora"], sizes["other"]))
    with pool.lease("lora"):
        pool.prefetch(["other"])
        pool.cache.close()
        assert pool.cache.loads == 1 and pool.cache.used == sizes["lora"]
    pool.prefetch(["other"])
    pool.cache.close()
    assert pool.cache.loads == 2 and pool.cache.used == sizes["other"]


def test_bad_inputs_by_name(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"host_bits is 3, expected one of \(1, 2, 4, 8\)"):
        AdapterPool(models.llama(), 10**6, host_bits=3)
    with pytest.raises(CheckpointError, match=r"made on another base: it changes .* at row 15, column 23"):
        AdapterPool(models.llama(hidden_size=8), 10**6).add("s", folders["shira"])
    with pytest.raises(CheckpointError, match="no linear layer"):
        AdapterPool(models.bert(), 10**6).add("s", folders["shira"])
