"""Families are rows: keywords, places, what layers share, plug-ins. Run: pytest tests/experts/test_family.py"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moa
from moa.delta import Dense
from moa.errors import CheckpointError, ConfigError, FoldError
from moa.experts import FAMILIES, LoRABank
from moa.runs.config import read_config
from tests import laws, models, tiny_run
from tests.laws import assert_close

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "families.md").read_text()


class BasisBank(moa.ExpertBank):
    """E_e(x) = up (v_e ⊙ (down x)), down and up shared by all layers, as VeRA has them."""

    per_expert = ("v",)

    def __init__(self, site: moa.Site, n_experts: int, shared: nn.Module, **options: Any) -> None:
        super().__init__(site.d_in, site.d_out, n_experts, **options)
        self.shared = shared
        self.v = nn.Parameter(torch.zeros(n_experts, shared.down.shape[0]))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.v)

    def delta(self, expert: int) -> Dense:
        down, up = self.shared.down[:, : self.d_in], self.shared.up[: self.d_out]
        return Dense((up * self.v[expert]) @ down * self.scaling)

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        return x @ self.delta(expert).dense().to(x.dtype).T


class Bases(nn.Module):
    """Random bases as wide as the widest layer: one drawn from a seed and not saved, one trained."""

    def __init__(self, rank: int, d_in: int, d_out: int, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.register_buffer("down", torch.randn(rank, d_in, generator=draw), persistent=False)
        self.up = nn.Parameter(torch.randn(d_out, rank, generator=draw))


@pytest.fixture
def basis() -> Iterator[None]:
    """Register a family with shared tensors for one test."""

    @moa.register_expert("basis", "a paper")
    @dataclass(frozen=True, kw_only=True)
    class Basis(moa.Family):
        uses = ("alpha",)
        places = ("input", "output")
        width: int = 3
        seed: int = 0

        def shared(self, sites: Any, **options: Any) -> nn.Module:
            return Bases(self.width, max(s.d_in for s in sites), max(s.d_out for s in sites), self.seed)

        def build(self, site: moa.Site, n_experts: int, shared: nn.Module | None, **options: Any) -> moa.ExpertBank:
            assert shared is not None
            return BasisBank(site, n_experts, shared, **options)

    yield
    del FAMILIES["basis"]


def built(**options: Any) -> Any:
    return moa.build(models.llama(), "topk", n_experts=4, expert="basis", **{"width": 5, "seed": 3, **options})


@pytest.mark.usefixtures("basis")
def test_what_layers_share_is_one_tensor_saved_once(tmp_path: Path) -> None:
    model = models.randomise(built())
    owner = model.shared_by_layers["0"]["experts"]
    banks = [branch.bank for _, branch in model.branches()]
    assert all(bank.shared is owner for bank in banks)
    batch = models.lm_batch()
    before = models.outputs_of(model, batch)
    model.train()(**batch).loss.backward()
    assert owner.up.grad is not None and bool(owner.up.grad.any())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert [name for name in saved if "shared" in name] == ["shared_by_layers.0.experts.up"], (
        "once, and no seeded buffer"
    )
    again = moa.load(tmp_path, base=models.llama())
    assert torch.equal(models.outputs_of(again, batch), before)
    assert again.recipes[0][0].family.width == 5 and again.recipes[0][0].family.seed == 3
    assert sum(p is again.shared_by_layers["0"]["experts"].up for p in again.parameters()) == 1


@pytest.mark.usefixtures("basis")
def test_a_shared_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    models.randomise(built()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    saved = load_file(file)
    del saved["shared_by_layers.0.experts.up"]
    save_file(saved, file, metadata=header)
    with pytest.raises(CheckpointError, match=r"1 missing: shared_by_layers\.0\.experts\.up"):
        moa.load(tmp_path, base=models.llama())


@pytest.mark.usefixtures("basis")
def test_a_build_that_fails_leaves_nothing_shared() -> None:
    model = moa.build(models.llama(), "topk", targets="attention")
    with pytest.raises(ConfigError):
        moa.build(model, "topk", expert="basis", targets="nothing_of_this")
    assert not model.shared_by_layers
    moa.build(model, "topk", expert="basis", targets="ffn")
    assert list(model.shared_by_layers) == ["1"]
    model.unload()
    assert not model.shared_by_layers


@pytest.mark.usefixtures("basis")
def test_keywords_of_a_family_in_a_configuration_and_a_checkpoint(tmp_path: Path) -> None:
    keywords = {"router": "topk", "expert": "basis", "width": 7}
    values = tiny_run.config_values(tmp_path, tiny_run.encoder_folder(tmp_path / "base"))
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**values, "recipe": keywords}))
    recipe = moa.make_recipe(**read_config(config).recipe)
    assert recipe.family.width == 7
    for wrong, match in (({"width": "wide"}, "width must be a whole number"), ({"widht": 7}, "Did you mean 'width'")):
        config.write_text(yaml.safe_dump({**values, "recipe": {**keywords, **wrong}}))
        with pytest.raises(ConfigError, match=match):
            read_config(config)
    row = recipe.to_dict()
    assert row["expert"] == "basis" and row["width"] == 7 and "rank" not in row
    assert moa.make_recipe(**row) == recipe


@pytest.mark.usefixtures("basis")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"expert": "basis", "widht": 3}, r"unknown keyword 'widht'.*Did you mean 'width'"),
        ({"expert": "bassis"}, r"unknown expert family 'bassis'.*Did you mean 'basis'"),
        ({"expert": "basis", "rank": 4}, r"family 'basis' have no rank: rank=4 would do nothing"),
        ({"expert": "basis", "place": "block"}, r"family 'basis' sit on input or output: place='block'"),
        ({"place": "beside"}, r"place='beside' does not fit"),
        ({"router": "hydra", "place": "output"}, r"recipe 'hydra' puts experts on input: place='output'"),
        ({"router": "poly", "expert": "basis"}, r"recipe 'poly' has experts of its own kind \(lora\)"),
        ({"router": "flylora", "expert": "shared"}, r"recipe 'flylora' has experts of its own kind"),
        ({"router": "arrow", "expert": "affine"}, r"recipe 'arrow' has experts of its own kind"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        moa.make_recipe(**{"router": "topk", **options})


# ------------------------------------------------------------------------------------------------ places


@pytest.mark.parametrize("place", ["output", "block"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_places(place: str, kind: str, tmp_path: Path) -> None:
    """On an output or after a block, y = y0 + Σ w E(y0), as an independent sum says; saved, loaded, taken out."""
    make, make_batch = models.MODELS[kind]
    batch = make_batch()
    plain = models.outputs_of(make(), batch)
    targets = r".*layers?\.\d+" if place == "block" else "all-linear"
    model = moa.build(make(), "topk", n_experts=4, place=place, targets=targets, modules_to_save=[])
    assert_close(models.outputs_of(model, batch), plain, 1e-6)
    models.randomise(model)
    seen: list[tuple[Tensor, Tensor]] = []
    name, mixture = next(iter(model.mixtures().items()))
    mixture.base.register_forward_hook(lambda _m, _a, out: seen.append((out if isinstance(out, Tensor) else out[0],)))
    mixture.register_forward_hook(lambda _m, _a, out: seen.append((out if isinstance(out, Tensor) else out[0],)))
    changed = models.outputs_of(model, batch)
    (y0,), (y,) = seen[:2]
    (branch,) = mixture.branches
    routing = branch.router(y0, model.context)
    dense = torch.stack([branch.bank.delta(e).dense() for e in range(4)])
    expected = y0 + torch.einsum("...e,eoi,...i->...o", routing.dense(), dense, y0)
    assert_close(y, expected, 1e-5)
    assert not torch.allclose(changed, plain, atol=1e-3)
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(models.outputs_of(model, batch), plain)
    model.save_pretrained(tmp_path)
    again = moa.load(tmp_path, base=make())
    assert torch.equal(models.outputs_of(again, batch), changed)
    with pytest.raises(FoldError, match=re.escape(name)):
        model.merge_and_unload()
    assert torch.equal(models.outputs_of(model.unload(), batch), plain)


def test_blocks_and_their_layers_carry_experts_together() -> None:
    plain = models.outputs_of(models.llama(), models.lm_batch())
    model = moa.build(models.llama(), "topk", place="block")
    moa.build(model, "dense", targets="attention")
    models.randomise(model)
    assert len(model.mixtures()) == 2 + 2 * 4
    assert model.eval().generate(models.lm_batch()["input_ids"][:, :4], max_new_tokens=3).shape[1] == 7
    assert torch.equal(models.outputs_of(model.unload(), models.lm_batch()), plain)


# ------------------------------------------------------------------------------------------------ plug-ins

CHECK = """
import sys
import torch
import moa
from tests import models
from tests.laws import assert_close

model = models.randomise(moa.build(models.llama(), router="topk", expert="largest", density=0.05))
bank = next(branch.bank for _, branch in model.branches())
assert type(bank).__module__ == "sparse_family"
weight = next(iter(model.mixtures().values())).base.weight
assert bank.places.shape == (8, int(0.05 * weight.numel()))
assert bank.places.flatten().unique().numel() == bank.places.numel(), "experts have places of their own"
batch = models.lm_batch()
model.train()(**batch).loss.backward()
assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
model.save_pretrained(sys.argv[1])
again = moa.load(sys.argv[1], base=models.llama())
assert again.recipes[0][0].family.density == 0.05
assert torch.equal(models.outputs_of(again, batch), models.outputs_of(model, batch))
static = models.randomise(moa.build(models.llama(), router="fixed", n_experts=2, expert="largest", density=0.05))
expected = models.outputs_of(static, batch)
assert_close(models.outputs_of(static.merge_and_unload(), batch), expected, 1e-5)
print("fine")
"""


def test_a_family_from_outside_the_package(tmp_path: Path) -> None:
    """The family of docs/families.md, installed as pip would lay it out."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", DOC, re.S) if "class SparseFamily" in block)
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from", '"""'))]
    assert len(lines) <= 30, len(lines)
    site = tmp_path / "site"
    info = site / "sparse_family-0.1.dist-info"
    info.mkdir(parents=True)
    (site / "sparse_family.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sparse-family\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[moa.experts]\nlargest = sparse_family:SparseFamily\n")
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHECK), str(tmp_path / "saved")],
        cwd=ROOT,
        env={"PYTHONPATH": f"{site}:{ROOT}", "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0 and run.stdout.strip().endswith("fine"), run.stderr[-2000:]


def test_a_name_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moa.experts.family, "FAMILIES", dict(FAMILIES))
    with pytest.raises(ConfigError, match=r"family 'lora' is already moa\.experts\.lora\.LoRA"):
        moa.register_expert("lora")(type("Other", (moa.Family,), {}))
    with pytest.raises(ConfigError, match=r"unknown place 'beside'"):
        moa.register_expert("mine")(type("Mine", (moa.Family,), {"places": ("beside",)}))


def test_the_documents_list_every_family() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", DOC, re.M)) == set(FAMILIES)


# ------------------------------------------------------------------------------------------------ the base's weight


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning", "ignore:.*quantiz.*:DeprecationWarning")
def test_a_site_gives_the_weight_of_a_quantised_layer() -> None:
    class Codes(nn.Module):
        in_features, out_features = 3, 2

        def __init__(self) -> None:
            super().__init__()
            self.codes = torch.randint(-8, 8, (2, 3))
            self.weight = QuantisedLike(self.codes)

    class QuantisedLike(Tensor):
        @staticmethod
        def __new__(cls, codes: Tensor) -> QuantisedLike:
            return torch.zeros(codes.shape).as_subclass(cls)

        def __init__(self, codes: Tensor) -> None:
            self.own = codes

        def dequantize(self) -> Tensor:
            return self.own * 0.5

    layer = Codes()
    assert torch.equal(moa.Site("q", layer, 3, 2).weight(), layer.codes * 0.5)
    dynamic = torch.ao.nn.quantized.dynamic.Linear(3, 2)
    assert_close(moa.Site("d", dynamic, 3, 2).weight(), dynamic.weight().dequantize())
    with pytest.raises(ConfigError, match=r"e is a Identity, whose weight cannot be read as one matrix"):
        moa.Site("e", nn.Identity(), 3, 2).weight()


def test_the_bank_of_a_family_is_what_the_recipe_builds() -> None:
    site = moa.Site("q", nn.Linear(3, 2), 3, 2)
    assert isinstance(moa.make_recipe("topk", rank=1).bank(site), LoRABank)
    assert laws.make_bank("lora", "default", 3, 2, 4, 1).scaling == 0.7


@pytest.mark.parametrize("name", [name for name, cls in FAMILIES.items() if "seed" in cls.__dataclass_fields__])
def test_another_seed_draws_other_numbers(name: str) -> None:
    """And one seed the same again, another layer others where layers draw for themselves."""
    if name == "dylora":  # its seed is of the ranks, one for each step
        pytest.skip("it draws no tensors")

    def drawn(seed: int) -> dict[str, Tensor]:
        family = moa.experts.make_family(name, {"seed": seed, **({"down": "frozen"} if name == "hypelora" else {})})
        site, options = moa.Site("layer", nn.Linear(12, 12), 12, 12), {"rank": 3, "scaling": 1.0}
        bank = family.build(site, 2, family.shared([site], **options), **options)
        return {key: value for key, value in bank.named_buffers() if value.numel() > 4}

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert one and all(torch.equal(value, again[key]) for key, value in one.items())
    assert any(not torch.equal(value, other[key]) for key, value in one.items())
