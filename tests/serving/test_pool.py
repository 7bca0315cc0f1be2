"""Many adapters on one base: against peft's mixed batch. Run: pytest tests/serving/test_pool.py"""

from __future__ import annotations

import random
import threading

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from moa.errors import BackendError, CheckpointError, ConfigError, ContextError, NumericsError
from moa.serving.pool import AdapterPool
from tests import models

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
RANKS = {"a": 2, "b": 7, "c": 4, "d": 1}
TARGETS = {"a": ["q_proj", "down_proj"], "b": ["q_proj", "k_proj", "up_proj"], "c": ["v_proj"], "d": ["o_proj"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate(RANKS.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=TARGETS[name], init_lora_weights=False)
        get_peft_model(models.llama(), config).save_pretrained(root / name)
    return {name: root / name for name in RANKS}


@pytest.fixture
def pool(folders):
    pool = AdapterPool(models.llama(), capacity_bytes=10**6)
    for name, folder in folders.items():
        pool.add(name, folder)
    yield pool
    pool.close()


IDS = ["b", "a", None, "c", "b", None, "d"]


def batch(n=7, length=6):
    ids = torch.randint(3, models.VOCAB, (n, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def peft_model(folders):
    model = PeftModel.from_pretrained(models.llama(), folders["a"], adapter_name="a")
    for name, folder in folders.items():
        if name != "a":
            model.load_adapter(folder, name)
    return model.eval()


def test_a_mixed_batch_is_that_of_peft(pool, folders):
    inputs, theirs = batch(), ["__base__" if name is None else name for name in IDS]
    reference = peft_model(folders)
    with torch.no_grad():
        expected = reference(**inputs, adapter_names=theirs).logits
        plain = models.llama()(**inputs).logits
    found = pool(**inputs, adapter_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    changed = [not torch.allclose(a, b, atol=1e-3) for a, b in zip(found, plain, strict=True)]
    assert changed == [name is not None for name in IDS]
    torch.testing.assert_close(pool(**inputs).logits, plain, rtol=0, atol=0)
    tokens = pool.generate(**inputs, adapter_ids=IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(tokens, reference.generate(**inputs, adapter_names=theirs, max_new_tokens=5, do_sample=False)), (
        "prefill and decode"
    )


def test_a_request_does_not_depend_on_the_batch(pool):
    inputs = batch()
    together = pool(**inputs, adapter_ids=IDS).logits
    order = [4, 2, 0, 6]
    some = {name: value[order] for name, value in inputs.items()}
    torch.testing.assert_close(pool(**some, adapter_ids=[IDS[n] for n in order]).logits, together[order])
    for n, name in enumerate(IDS):
        alone = pool(**{key: value[n : n + 1] for key, value in inputs.items()}, adapter_ids=[name]).logits
        torch.testing.assert_close(alone, together[n : n + 1])
    beams = pool.generate(**inputs, adapter_ids=IDS, max_new_tokens=4, num_beams=2, do_sample=False)
    one = {key: value[:1] for key, value in inputs.items()}
    assert torch.equal(
        beams[:1], pool.generate(**one, adapter_ids=IDS[:1], max_new_tokens=4, num_beams=2, do_sample=False)
    )


def test_a_decoding_step_takes_the_way_of_few_rows_and_gives_what_the_others_give(pool, monkeypatch):
    """In order, out of order, a layer that an adapter does not have, and more rows than that way is for."""
    from moa.serving import pool as module

    ways: list[int] = []
    real = module.add_small
    monkeypatch.setattr(module, "add_small", lambda y, *rest: (ways.append(len(y)), real(y, *rest)))
    for ids in (["a", "a", "b"], ["b", None, "a", "b"], ["c", "a"]):
        inputs = batch(len(ids), 1)
        found = pool(**inputs, adapter_ids=ids).logits
        assert ways and set(ways) == {len(ids)}
        ways.clear()
        monkeypatch.setattr(module, "MOST_ROWS", 0)
        torch.testing.assert_close(found, pool(**inputs, adapter_ids=ids).logits, rtol=1e-5, atol=1e-6)
        monkeypatch.undo()
        monkeypatch.setattr(module, "add_small", lambda y, *rest: (ways.append(len(y)), real(y, *rest)))
        pool(**batch(len(ids), 2), adapter_ids=ids)
        assert not ways, "a prefill has more rows"
    pool(**batch(9, 1), adapter_ids=["a"] * 9)
    assert not ways


def test_evicted_and_reloaded_is_the_same_bit_for_bit(folders):
    sizes = AdapterPool(models.llama(), 10**6)
    for name, folder in folders.items():
        sizes.add(name, folder)
    largest = max(host.n_bytes for host in sizes._hosts.values())
    pool = AdapterPool(models.llama(), largest)  # room for one of the larger
    for name, folder in folders.items():
        pool.add(name, folder)
    inputs = batch(1)
    first = {name: pool(**inputs, adapter_ids=[name]).logits for name in RANKS}
    loads = pool.cache.loads
    for name in RANKS:
        assert torch.equal(pool(**inputs, adapter_ids=[name]).logits, first[name])
        assert pool.cache.used <= largest
    assert pool.cache.loads > loads, "nothing was evicted"
    with pytest.raises(BackendError, match=r"no room for adapter 'b'.*pinned"):
        pool(**batch(2), adapter_ids=["a", "b"])
    assert torch.equal(pool(**inputs, adapter_ids=["b"]).logits, first["b"]), "the others go on"
    with pool.lease("b"), pytest.raises(BackendError, match="pinned"), pool.lease("a"):
        pass


def test_add_replace_and_remove_while_it_runs(pool, folders):
    inputs = batch(1)
    a, c = (pool(**inputs, adapter_ids=[name]).logits for name in "ac")
    used = pool.cache.used
    with pool.lease("a"):
        pool.replace("a", folders["c"])
        assert torch.equal(pool(**inputs, adapter_ids=["a"]).logits, c)
        assert pool.cache.used > used, "what runs with the old one keeps it"
    assert pool.cache.used < used + 1
    pool.remove("b")
    with pytest.raises(ContextError, match=r"unknown adapter 'b'.*removed"):
        pool(**batch(2), adapter_ids=["a", "b"])
    pool.add("b", folders["a"])
    assert torch.equal(pool(**inputs, adapter_ids=["b"]).logits, a)


def test_bad_inputs_by_name(folders, tmp_path):
    pool = AdapterPool(models.llama(), 10**6, max_rank=4)
    pool.add("a", folders["a"])
    with pytest.raises(ConfigError, match="in the pool already"):
        pool.add("a", folders["a"])
    with pytest.raises(CheckpointError, match=r"rank 7 on .*up to 4"):
        pool.add("b", folders["b"])
    with pytest.raises(CheckpointError, match="another base"):
        AdapterPool(models.llama(hidden_size=32), 10**6).add("a", folders["a"])
    with pytest.raises(CheckpointError, match="no linear layer"):
        AdapterPool(models.bert(), 10**6).add("a", folders["a"])
    with pytest.raises(ConfigError, match="the pool's device holds 10"):
        AdapterPool(models.llama(), 10).add("a", folders["a"])
    with pytest.raises(ConfigError, match="at least 1"):
        AdapterPool(models.llama(), 0)
    with pytest.raises(ContextError, match="give a list"):
        pool(**batch(1), adapter_ids="a")
    bad = get_peft_model(models.llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for name, parameter in bad.named_parameters():
        if "lora_A" in name:
            parameter.data[0, 0] = float("nan")
    bad.save_pretrained(tmp_path)
    with pytest.raises(NumericsError):
        pool.add("nan", tmp_path)
    assert pool.names == ["a"]


def test_soak(folders):
    """Random requests of two threads, adapters added, replaced and removed between: always right, never too large."""
    kinds = list(RANKS)
    truth_pool = AdapterPool(models.llama(), 10**6)
    for kind, folder in folders.items():
        truth_pool.add(kind, folder)
    inputs = batch(1, 3)
    truth = {kind: truth_pool(**inputs, adapter_ids=[kind]).logits for kind in kinds}
    truth[None] = truth_pool(**inputs).logits
    largest = max(host.n_bytes for host in truth_pool._hosts.values())
    pool = AdapterPool(models.llama(), 9 * largest)  # of 40 adapters; two threads run four each
    held = {f"{kind}{n}": kind for n in range(10) for kind in kinds}
    for name, kind in held.items():
        pool.add(name, folders[kind])
    wrong: list[str] = []

    def serve(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(40):
            names = [None if draw.random() < 0.2 else draw.choice(list(held)) for _ in range(4)]
            many = {key: value.expand(4, -1) for key, value in inputs.items()}
            found = pool(**many, adapter_ids=names).logits
            for row, name in zip(found, names, strict=True):
                if not torch.allclose(row, truth[held.get(name)][0], atol=1e-5):
                    wrong.append(f"{name} is wrong")
            if pool.cache.used > pool.cache.capacity_bytes:
                wrong.append(f"{pool.cache.used} bytes")

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    draw = random.Random(7)
    for n in range(20):
        kind = draw.choice(kinds)
        pool.add(f"new{n}", folders[kind])
        pool.replace(f"new{n}", folders[draw.choice(kinds)])
        pool.remove(f"new{n}")
        pool.prefetch(draw.sample(list(held), 3))
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:5]
    assert pool.cache.loads > len(held), "nothing was evicted"
