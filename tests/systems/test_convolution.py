"""Mixtures on convolutions: all recipes, peft's LoRA, exact folds. Run: pytest tests/systems/test_convolution.py"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextModel, ResNetConfig, ResNetForImageClassification

import moa
from moa.errors import ConfigError, ContextError, FoldError, ShapeError
from moa.layers import as_weight, features, matrix, patches
from moa.mixture import mixture_on
from moa.mixture.mixture import ConvMixture
from moa.recipes import Site
from tests import laws, models
from tests.laws import assert_close

# PyTorch says so of even kernels that are padded to the same size
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

PATCHES = ["patch_embeddings.projection"]
SHAPES: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = [
    (nn.Conv2d, (9, 8), {"kernel_size": 4, "stride": 4}),
    (nn.Conv2d, (9, 8), {"kernel_size": 1}),
    (nn.Conv2d, (9, 8), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
    (nn.Conv2d, (9, 8), {"kernel_size": 4, "padding": "same"}),
    (nn.Conv2d, (9, 8), {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "bias": False}),
    (nn.Conv2d, (9, 8), {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"}),
    (nn.Conv1d, (11,), {"kernel_size": 5, "stride": 2, "padding": 3}),
    (nn.Conv3d, (5, 4, 6), {"kernel_size": (2, 3, 2), "padding": 1, "stride": (1, 2, 2)}),
]
IDS = [f"{kind.__name__}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for kind, _, options in SHAPES]
shapes = pytest.mark.parametrize(("kind", "size", "options"), SHAPES, ids=IDS)


@shapes
def test_a_convolution_is_its_matrix_on_patches(kind: Any, size: tuple[int, ...], options: dict[str, Any]) -> None:
    conv = kind(3, 5, **options).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = matrix(conv)
    assert weight is not None and features(conv) == (weight.shape[1], weight.shape[0])
    assert torch.equal(as_weight(conv, weight), conv.weight)
    rows = patches(conv, x) @ weight.T
    expected = conv(x)
    if conv.bias is not None:
        rows = rows + conv.bias
    assert_close(rows.mT.reshape(expected.shape), expected)


@shapes
@pytest.mark.parametrize("biases", [False, True], ids=["linear", "affine"])
def test_hydra_adds_both_branches_and_folds(
    kind: Any, size: tuple[int, ...], options: dict[str, Any], biases: bool
) -> None:
    """The parallel branch is a convolution of rank r, the sequential one a 1 × 1 convolution behind the layer."""
    conv = kind(3, 5, **options).double().requires_grad_(False)
    d_in, d_out = features(conv) or (0, 0)
    recipe = moa.make_recipe("hydra", rank=2, sequential_rank=3, biases=biases)
    mixture = mixture_on(conv, recipe.build(Site("conv", conv, d_in, d_out)), moa.Context(), "conv").double().eval()
    for parameter in mixture.branches.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    h = conv(x)
    parallel, sequential = (branch.bank for branch in mixture.branches)

    def through(bank: Any, down: Any, source: Tensor) -> Tensor:
        """Convolve down to r channels by a module of the same geometry, then up by a 1 × 1 one."""
        low = down(source)
        if biases:
            low = low + bank.down_bias[0].view(-1, *[1] * len(size))
        high = torch.einsum("br...,ro->bo...", low, bank.up[0])
        return high + bank.up_bias[0].view(-1, *[1] * len(size)) if biases else high

    low_rank = kind(3, 2, **{**options, "bias": False}).double()
    low_rank.weight = nn.Parameter(parallel.down[0].detach().view_as(low_rank.weight))
    expected = h + through(parallel, low_rank, x)
    expected = expected + through(sequential, lambda v: torch.einsum("bo...,ro->br...", v, sequential.down[0]), h)
    assert_close(mixture(x), expected)
    assert_close(moa.fold(mixture)(x), expected)


@pytest.mark.parametrize("geometry", [{"stride": 4}, {"stride": (2, 1), "padding": 2}, {"padding": "same"}])
def test_one_lora_is_pefts(geometry: dict[str, Any]) -> None:
    """Values and every gradient, with peft's factors copied; peft's own does not know dilation."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 4, **geometry), nn.GELU(), nn.Conv2d(6, 4, 1)).double()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(net, config).double()
    plain = nn.Sequential(nn.Conv2d(3, 6, 4, **geometry), nn.GELU(), nn.Conv2d(6, 4, 1)).double()
    plain.load_state_dict(state)
    ours = moa.build(plain, "fixed", n_experts=1, rank=3, alpha=5.0, targets=["0", "2"])
    pairs = []
    for name, mixture in ours.mixtures().items():
        layer = theirs.base_model.model.get_submodule(name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        bank = mixture.branches[0].bank
        with torch.no_grad():
            bank.down[0].copy_(a.flatten(1))
            bank.up[0].copy_(b.flatten(1).T)
        pairs.append((bank, a, b))
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    mine, yours = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = ours(mine), theirs(yours)
    assert_close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    assert_close(mine.grad, yours.grad, what="gradient of x")
    for bank, a, b in pairs:
        assert_close(bank.down.grad[0], a.grad.flatten(1), what="gradient of A")
        assert_close(bank.up.grad[0], b.grad.flatten(1).T, what="gradient of B")


@pytest.mark.parametrize("change", [1.0, 1.001])
def test_the_comparison_sees_a_wrong_factor(change: float) -> None:
    conv = nn.Conv2d(3, 5, 3).double().requires_grad_(False)
    mixture = mixture_on(
        conv, moa.make_recipe("fixed", n_experts=1).build(Site("c", conv, 27, 5)), moa.Context(), "c"
    ).double()
    nn.init.normal_(mixture.branches[0].bank.up)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = mixture(x)
    folded = moa.fold(mixture)
    folded.weight = nn.Parameter(folded.weight * change)
    if change == 1.0:
        assert_close(folded(x), expected)
    else:
        with pytest.raises(AssertionError):
            assert_close(folded(x), expected)


@laws.parametrize(laws.RECIPE_CASES)
def test_every_recipe_on_a_patch_embedding(name: str, variant: str, tmp_path: Path) -> None:
    """A vision transformer's: a training step reaches every parameter, save and load are exact, fold or its reason."""
    batch = models.image_batch()
    if laws.needs_tasks(name):
        batch["task_ids"] = torch.arange(4) % laws.N_TASKS
    targets = [*PATCHES, "fc1", "fc2"] if name == "mixlora" else PATCHES
    if name == "xcross":  # streams run through blocks, and the embedding lies before them
        with pytest.raises(ConfigError, match="lie outside"):
            moa.build(models.vit(), laws.small_recipe(name, variant, targets=targets))
        return
    model = moa.build(models.vit(), laws.small_recipe(name, variant, targets=targets))
    assert isinstance(model.mixtures()["vit.embeddings.patch_embeddings.projection"], ConvMixture)
    if name == "xlora":  # the first pass has a row for the class token too
        with pytest.raises(ContextError, match="choose targets that see one row per token"):
            model(**batch)
        return
    base = models.outputs_of(models.vit(), {k: v for k, v in batch.items() if k != "task_ids"})
    if all(branch.bank.zero_at_init for _, branch in model.branches()):
        assert_close(models.outputs_of(model, batch), base, 1e-5)
    with model.disable_adapter():
        assert torch.equal(models.outputs_of(model, batch), base)
    models.randomise(model)
    model.train()
    model(**batch).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and bool(parameter.grad.any()), parameter_name
    model.eval()
    before = models.outputs_of(model, batch)
    assert not torch.allclose(before, base, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert torch.equal(models.outputs_of(moa.load(tmp_path, base=models.vit()), batch), before)
    batch.pop("task_ids", None)
    model, batch = model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    try:
        folded = model.merge_and_unload()
    except FoldError as error:
        assert "vit." in str(error)
        return
    assert_close(models.outputs_of(folded, batch), before.double(), 1e-5)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_peft_reads_what_is_exported_and_the_other_way_round(tmp_path: Path) -> None:
    targets = [*PATCHES, "q_proj"]
    model = moa.build(models.vit(), "topk", n_experts=2, k=1, rank=3, targets=targets, modules_to_save=[]).eval()
    models.randomise(model)
    batch = {"pixel_values": models.image_batch()["pixel_values"]}
    folders = [moa.export_expert(model, e, tmp_path / str(e)) for e in range(2)]
    again = moa.build(models.vit(), "topk", experts=folders, k=1, modules_to_save=[]).eval()
    for e, folder in enumerate(folders):
        with model.pin_expert(e):
            expected = models.outputs_of(model, batch)
        theirs = peft.PeftModel.from_pretrained(models.vit(), folder).eval()
        assert len([n for n, _ in theirs.named_parameters() if "lora_A" in n]) == 3
        assert_close(models.outputs_of(theirs, batch), expected, 1e-5)
        with again.pin_expert(e):
            assert_close(models.outputs_of(again, batch), expected, 1e-5)


def resnet() -> ResNetForImageClassification:
    torch.manual_seed(1)
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config).eval()


def test_a_resnet_trains_and_folds() -> None:
    model = moa.build(resnet(), "hydra", rank=2, targets=["convolution"], modules_to_save=["classifier"])
    assert len(model.mixtures()) == 6 and all(isinstance(m, ConvMixture) for m in model.mixtures().values())
    batch = {"pixel_values": torch.randn(4, 1, 16, 16), "labels": torch.tensor([0, 1, 2, 0])}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model = model.double().eval()
    batch = {**batch, "pixel_values": batch["pixel_values"].double()}
    before = models.outputs_of(model, batch)
    assert_close(models.outputs_of(model.merge_and_unload(), batch), before)


def test_names_and_patterns_find_convolutions_and_groups_of_linears_do_not() -> None:
    names = moa.build(models.vit(), "topk", n_experts=2, k=1).mixtures()
    assert not any("projection" in name for name in names)
    names = moa.build(models.vit(), "topk", n_experts=2, k=1, targets=r".*projection").mixtures()
    assert list(names) == ["vit.embeddings.patch_embeddings.projection"]


def test_bad_inputs() -> None:
    torch.manual_seed(1)
    convnext = ConvNextModel(ConvNextConfig(num_channels=1, hidden_sizes=[4, 8], depths=[1, 1], num_stages=2))
    with pytest.raises(ConfigError, match=r"dwconv is a Conv2d of 4 groups, each of which sees its own channels"):
        moa.build(convnext, "hydra", targets=["dwconv"])
    assert not any(isinstance(m, ConvMixture) for m in convnext.modules())
    built = moa.build(convnext, "hydra", targets=["pwconv1"])  # grouped ones that nobody asked for are in nobody's way
    again = moa.build(ConvNextModel(convnext.config), "fixed", n_experts=1, targets=["pwconv2"])
    assert len(again.add_recipe(moa.make_recipe("fixed", n_experts=1), list(built.mixtures()))) == 2
    model = moa.build(nn.Sequential(nn.Conv2d(3, 4, 2)), "fixed", n_experts=1, targets=["0"])
    with pytest.raises(ShapeError, match=r"needs x with a batch axis, 4 axes in all, got \(3, 5, 5\)"):
        model(torch.randn(3, 5, 5))
    with pytest.raises(ConfigError, match="has no linear layer"):
        moa.build(nn.Sequential(nn.ConvTranspose2d(3, 4, 2)), "fixed", targets=["0"])
