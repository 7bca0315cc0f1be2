"""X-Cross: crossings against their equation, streams against models alone.

Run: pytest tests/systems/test_xcross.py
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import moa
from moa.errors import ConfigError, ShapeError
from moa.mixture.streams import Crossing, Streams
from moa.routers import IdRouter
from tests import models
from tests.laws import assert_close

from . import adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
KINDS = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "value"], "gpt2": ["c_attn", "c_proj"]}


def folders_for(kind: str, tmp_path: Path, n: int = 3) -> list[Path]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adapters.write(tmp_path / f"{kind}{n}", models.MODELS[kind][0], n=n, targets=KINDS[kind])


def build(kind: str, folders: list[Path], **options: Any) -> Any:
    return moa.build(models.MODELS[kind][0](), "xcross", experts=folders, **options).eval()


def test_crossing_is_the_papers_equation() -> None:
    n, d, beta, gamma = 3, 5, 0.7, -0.4
    crossing = Crossing(n, d, beta, gamma).double()
    nn.init.normal_(crossing.weight)
    h = torch.randn(n, 2, 4, d, dtype=torch.float64)
    got = crossing(h)
    pairs = [(m, other) for m in range(n) for other in range(n) if other != m]
    for b in range(2):
        for t in range(4):
            z = crossing.weight @ torch.cat([h[m, b, t] for m in range(n)])
            for m in range(n):
                expected = h[m, b, t].clone()
                for number, (own, other) in enumerate(pairs):
                    if own == m:
                        expected += beta * z[number] * h[other, b, t]
                        expected += gamma * z[len(pairs) + number] * (h[m, b, t] - h[other, b, t])
                assert_close(got[m, b, t], expected)


def test_crossing_starts_as_the_identity_with_a_gradient() -> None:
    crossing = Crossing(3, 5)
    h = torch.randn(3, 2, 4, 5)
    assert torch.equal(crossing(h), h)
    (crossing(h) * torch.randn(3, 2, 4, 5)).sum().backward()
    assert bool((crossing.weight.grad != 0).any(1).all()), "every row of W learns at once"


def adapted(kind: str, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(models.MODELS[kind][0](), folder).eval()


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_stream_is_the_adapted_model(kind: str, tmp_path: Path) -> None:
    folders = folders_for(kind, tmp_path, 1)
    batch = models.MODELS[kind][1]()
    with torch.no_grad():
        expected = adapted(kind, folders[0])(**batch).logits
    assert_close(models.outputs_of(build(kind, folders), batch), expected, 1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_streams_that_do_not_cross_are_independent_models(kind: str, tmp_path: Path) -> None:
    folders = folders_for(kind, tmp_path)
    model, batch = build(kind, folders), models.MODELS[kind][1]()
    for number, folder in enumerate(folders):
        with torch.no_grad():
            model.streams.weights.copy_(torch.eye(3)[number])
            expected = adapted(kind, folder)(**batch).logits
        assert_close(models.outputs_of(model, batch), expected, 1e-5)
    with model.pin_expert(1):
        assert_close(models.outputs_of(model, batch), adapted(kind, folders[1])(**batch).logits, 1e-5)


def test_every_block_crosses(tmp_path: Path) -> None:
    """Against a plain loop over separate models whose hidden states are crossed by hand after every block."""
    folders = folders_for("llama", tmp_path)
    model = models.randomise(build("llama", folders), scale=0.05)
    with torch.no_grad():
        model.streams.weights.copy_(torch.tensor([0.5, 0.8, -0.3]))
    ids = models.token_batch(2, 5)["input_ids"].clamp(min=2)
    alone = [adapted("llama", folder).base_model.model.model for folder in folders]
    with torch.no_grad():
        hidden = torch.stack([m.embed_tokens(ids) for m in alone])
        positions = torch.arange(5)[None]
        turned = alone[0].rotary_emb(hidden[0], positions)
        causal = torch.full((5, 5), float("-inf")).triu(1)[None, None]
        for number in range(2):
            after = []
            for stream, m in enumerate(alone):
                out = m.layers[number](hidden[stream], position_embeddings=turned, attention_mask=causal)
                after.append(out[0] if isinstance(out, tuple) else out)
            hidden = model.streams.crossings[number](torch.stack(after))
        one = torch.einsum("m...,m->...", hidden, model.streams.weights)
        expected = model.base.lm_head(model.base.model.norm(one))
    assert_close(models.outputs_of(model, {"input_ids": ids}), expected, 1e-5)


def test_crossings_weights_and_head_alone_are_trained(tmp_path: Path) -> None:
    model = build("bert", folders_for("bert", tmp_path))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {
        "streams.weights",
        "streams.crossings.0.weight",
        "streams.crossings.1.weight",
        "base.classifier.weight",
        "base.classifier.bias",
    }
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    losses = []
    for _ in range(6):
        loss = model.train()(**models.class_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value) != (name in names), name


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generation_with_a_cache_is_generation_without(tmp_path: Path, strategy: dict[str, int]) -> None:
    model = models.randomise(build("llama", folders_for("llama", tmp_path)), scale=0.05)
    with torch.no_grad():
        model.streams.weights.fill_(1 / 3)
    prompt = models.token_batch(3, 6)["input_ids"].clamp(min=2)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt), **strategy}
    cached = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


def test_save_load_copy_and_unload(tmp_path: Path) -> None:
    folders = folders_for("bert", tmp_path)
    model, batch = models.randomise(build("bert", folders), scale=0.1), models.class_batch()
    before = models.outputs_of(model, batch)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(models.outputs_of(moa.load(tmp_path / "saved", base=models.bert()), batch), before)
    twin = copy.deepcopy(model)
    models.randomise(twin, scale=0.1, seed=9)
    assert torch.equal(models.outputs_of(model, batch), before)
    assert not torch.allclose(models.outputs_of(twin, batch), before, atol=1e-4)
    plain = models.outputs_of(model.unload(), batch)
    fresh = models.bert()
    fresh.classifier.load_state_dict(model.base.classifier.state_dict())
    assert torch.equal(plain, models.outputs_of(fresh, batch))


def test_checkpointed_blocks_cross_once(tmp_path: Path) -> None:
    model = models.randomise(build("llama", folders_for("llama", tmp_path)), scale=0.05)
    batch = models.lm_batch()

    def gradients() -> list[Tensor]:
        model.train().zero_grad()
        model(**batch).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for got, expected in zip(gradients(), plain, strict=True):
        assert_close(got, expected, 1e-5)


def test_bad_inputs(tmp_path: Path) -> None:
    folders = folders_for("bert", tmp_path)
    for router, options, text in (
        ("xcross", {}, "is for adapters that exist already"),
        ("xcross", {"experts": folders, "n_experts": 4}, "n_experts=4 was asked for, but the adapters given have 3"),
        (
            "xcross",
            {"experts": folders, "k": 2},
            "k=2 cannot be chosen in the recipe 'xcross': a stream has one expert",
        ),
    ):
        with pytest.raises(ConfigError, match=text):
            moa.build(models.bert(), router, **options)
    pooling = adapters.write(tmp_path / "pool", models.bert, n=1, targets=["pooler.dense", "query"])
    with pytest.raises(ConfigError, match=r"bert\.pooler\.dense lie outside"):
        moa.build(models.bert(), "xcross", experts=pooling)
    with pytest.raises(ConfigError, match="runs in streams already"):
        model = build("bert", folders)
        moa.build(model, moa.make_recipe("xcross", n_experts=2, targets=["key"]))
    with pytest.raises(ShapeError, match=r"3 streams need rows \(n · B, …\), got \(4, 2\)"):
        IdRouter(5, 3)(torch.randn(4, 2, 5), moa.Context())
    assert isinstance(build("bert", folders).streams, Streams)
