"""`merge`: every row of the table, PEFT's own merges as reference, bad input.  pytest tests/merge/test_run.py"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor, nn

import moa.merge.jobs as engine
from moa.errors import ConfigError, MoaError, NumericsError, ShapeError
from moa.merge import METHODS, Delta, Dense, LowRank, difference, merge, merge_lazily, read_peft, squeeze
from moa.merge.options import REQUIRED
from moa.merge.sparsify import draw_mask, generator_for

from .tools import assert_close, factors, lora_folder, matrices

SHAPES = {"0.q": (7, 5), "1.v": (6, 9)}
# What each row cannot do without, and how many adapters it joins.
NEEDED: dict[str, dict[str, Any]] = {
    "magnitude": {"density": 0.4},
    "dare": {"density": 0.4},
    "dare_ties": {"density": 0.4},
    "della": {"density": 0.4},
    "della_linear": {"density": 0.4},
    "breadcrumbs": {"density": 0.4},
    "breadcrumbs_ties": {"density": 0.4},
    "regmean": {"grams": [{"0.q": torch.eye(5).double(), "1.v": torch.eye(9).double()}] * 3},
    "fisher": {"fishers": [{n: torch.rand(s).double() for n, s in SHAPES.items()}] * 3},
    "adamerging": {"loss": lambda merged: sum((t**2).sum() for t in merged.values()), "steps": 2},
    "emr": {"task": 1},
}
KEEPS_FACTORS = {
    *("average", "task_arithmetic", "stack", "slerp", "model_stock", "average_factors", "flylora_dense"),
    *("knots", "tsv", "isotropic", "adamerging"),
}


def adapters(n: int = 3, rank: int = 2, norm: bool = False) -> list[dict[str, Any]]:
    sets: list[dict[str, Any]] = [
        {name: factors(rank, *shape, seed=10 * t + len(name)) for name, shape in SHAPES.items()} for t in range(n)
    ]
    for t, s in enumerate(sets):
        if norm:
            s["norm"] = torch.linspace(1, 2 + t, 6, dtype=torch.float64)
    return sets


def run(method: str, sets: list[dict[str, Any]], **more: Any) -> dict[str, Delta]:
    return merge(sets[:2] if method == "slerp" else sets, method=method, **{**NEEDED.get(method, {}), **more})


def test_the_table_says_what_each_row_is() -> None:
    for name, row in METHODS.items():
        assert row.name == name
        assert row.paper
        assert row.definition
        assert {k for k, o in row.options.items() if o.default is REQUIRED} == set(NEEDED.get(name, {})) - {"steps"}
        assert all(o.doc for o in row.options.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_row_merges_and_touches_no_input(method: str) -> None:
    sets = adapters()
    before = [{n: (d.down.clone(), d.up.clone()) for n, d in s.items()} for s in sets]
    merged = run(method, sets)
    for name, shape in SHAPES.items():
        assert merged[name].shape == shape
        assert merged[name].dtype == torch.float64
        assert merged[name].finite()
        assert float(merged[name].dense().abs().max()) > 0
        assert isinstance(merged[name], LowRank) == (method in KEEPS_FACTORS)
        for s, kept in zip(sets, before, strict=True):
            assert torch.equal(s[name].down, kept[name][0])
            assert torch.equal(s[name].up, kept[name][1])


JOIN_FACTORS = ("stack", "average_factors")
# Masks, ends or tasks go by position.
BY_POSITION = ("dare", "dare_ties", "della", "della_linear", "slerp", "emr")


@pytest.mark.parametrize("method", [m for m in METHODS if m not in JOIN_FACTORS])
def test_low_rank_and_dense_inputs_give_the_same(method: str) -> None:
    sets = adapters()
    dense = [{n: Dense(d.dense()) for n, d in s.items()} for s in sets]
    low, full = run(method, sets), run(method, dense)
    for name in SHAPES:
        assert_close(low[name].dense(), full[name].dense(), 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_lazy_equals_eager_and_masks_do_not_depend_on_what_is_kept(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = adapters(2)
    options = {k: v[:2] if isinstance(v, list) else v for k, v in NEEDED.get(method, {}).items()}
    eager = merge(sets, method=method, **options)
    monkeypatch.setattr(engine, "KEEP_BYTES", 0)
    lazy = merge_lazily(list(sets), method=method, **options)
    assert list(lazy) == list(eager)
    for name in reversed(list(lazy)):
        assert torch.equal(lazy[name].dense(), eager[name].dense())


@pytest.mark.parametrize("method", [m for m in METHODS if m not in BY_POSITION])
def test_the_order_of_adapters_changes_nothing(method: str) -> None:
    sets = adapters()
    first, last = run(method, sets), run(method, sets[::-1])
    for name in SHAPES:
        assert_close(last[name].dense(), first[name].dense(), 1e-9)


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].fits])
def test_what_is_no_matrix_is_averaged_as_in_the_papers(method: str) -> None:
    sets = adapters(norm=True)
    merged = merge(sets, [1.0, 1.0, 1.0], method, **NEEDED.get(method, {}))
    assert_close(merged["norm"].dense(), torch.stack([s["norm"] for s in sets]).mean(0), 1e-13)


# --- closed forms -----------------------------------------------------------------------------------------------


def test_average_and_task_arithmetic() -> None:
    sets, w = adapters(), [0.5, 2.0, -1.0]
    full = [s["0.q"].dense() for s in sets]
    total = sum((x * d for x, d in zip(w, full, strict=True)), torch.zeros(7, 5))
    assert_close(merge(sets, w, "task_arithmetic")["0.q"].dense(), total, 1e-13)
    assert_close(merge(sets, w, "task_arithmetic", scale=0.3)["0.q"].dense(), 0.3 * total, 1e-13)
    assert_close(merge(sets, w, "stack")["0.q"].dense(), total, 1e-13)
    assert_close(merge(sets, w, "average")["0.q"].dense(), total / 1.5, 1e-13)
    assert_close(merge(sets, method="average")["0.q"].dense(), torch.stack(full).mean(0), 1e-13)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_ties_by_its_paper_ranks_the_whole_model(scope: str) -> None:
    sets = adapters()
    for s in sets:
        s["1.v"] = s["1.v"].scaled(10.0)  # so that the two scopes differ
    flat = [torch.cat([s[n].dense().reshape(-1) for n in SHAPES]) for s in sets]
    trimmed = []
    for f in flat:
        parts = [f] if scope == "model" else list(f.split([35, 54]))
        for part in parts:
            k = int(0.2 * len(part))
            part[part.abs().argsort(descending=True)[k:]] = 0
        trimmed.append(torch.cat(parts))
    stacked = torch.stack(trimmed)
    elected = stacked.sum(0).sign()
    agree = (stacked.sign() == elected) & (elected != 0)
    expected = 0.4 * (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)
    got = merge(sets, method="ties", density=0.2, scale=0.4, **({"scope": "tensor"} if scope == "tensor" else {}))
    assert_close(torch.cat([got[n].dense().reshape(-1) for n in SHAPES]), expected, 1e-13)


def test_densities_may_differ_per_adapter() -> None:
    sets = adapters()
    got = merge(sets, method="magnitude", density=[0.2, 0.5, 1.0])["0.q"].dense()
    kept = [merge_utils.magnitude_based_pruning(s["0.q"].dense(), d) for s, d in zip(sets, (0.2, 0.5, 1), strict=True)]
    assert_close(got, sum(kept, torch.zeros(7, 5)), 1e-13)


def test_della_linear_and_breadcrumbs_are_their_sparsifiers() -> None:
    from moa.merge.sparsify import drop_by_rank, keep_middle

    sets, w = adapters(), [0.5, 2.0, -1.0]
    full = [s["0.q"].dense() for s in sets]
    parts = [drop_by_rank(d, 0.4, 0.1, generator_for(7, t, "0.q")) for t, d in enumerate(full)]
    expected = sum((x * p for x, p in zip(w, parts, strict=True)), torch.zeros(7, 5))
    assert_close(merge(sets, w, "della_linear", density=0.4, seed=7)["0.q"].dense(), expected, 1e-13)
    middle = [keep_middle(d, 0.4, 0.1) for d in full]
    expected = sum((x * p for x, p in zip(w, middle, strict=True)), torch.zeros(7, 5))
    assert_close(merge(sets, w, "breadcrumbs", density=0.4, gamma=0.1)["0.q"].dense(), expected, 1e-13)


def test_adamerging_uses_what_it_learnt() -> None:
    sets = adapters(2)
    goal = {n: 0.8 * sets[0][n].dense() + 0.1 * sets[1][n].dense() for n in SHAPES}

    def loss(merged: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([((merged[n] - goal[n]) ** 2).mean() for n in goal]).sum()

    for layer_of in (None, lambda name: name):
        got = merge(sets, method="adamerging", loss=loss, steps=500, lr=0.02, layer_of=layer_of)
        for name in SHAPES:
            assert_close(got[name].dense(), goal[name], 1e-3)


def test_tensors_without_statistics_are_averaged_and_partial_ones_refused() -> None:
    sets = adapters()
    grams = [{"0.q": torch.eye(5).double() * (t + 1)} for t in range(3)]
    got = merge(sets, method="regmean", grams=grams)
    assert_close(got["1.v"].dense(), torch.stack([s["1.v"].dense() for s in sets]).mean(0), 1e-13)
    with pytest.raises(ConfigError, match=r"'0.q' for 2 of 3 adapters"):
        merge(sets, method="regmean", grams=[*grams[:2], {}])
    with pytest.raises(ConfigError, match="grams holds 2 mappings for 3"):
        merge(sets, method="regmean", grams=grams[:2])


# --- PEFT's own merges on the same adapters ---------------------------------------------------------------------


def peft_model(tmp_path: Path, ranks: tuple[int, ...] = (2, 2, 2)) -> tuple[Any, list[Path]]:
    model: Any = None
    for t, rank in enumerate(ranks):
        config = peft.LoraConfig(r=rank, lora_alpha=3, target_modules=["0", "1"], init_lora_weights=False)
        if model is None:
            model = peft.get_peft_model(nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 8)), config, adapter_name="a0")
        else:
            model.add_adapter(f"a{t}", config)
    model.save_pretrained(tmp_path)
    return model, [tmp_path / f"a{t}" for t in range(len(ranks))]


def delta_of(model: Any, name: str) -> dict[str, Tensor]:
    layers = {f"{i}.weight": model.base_model.model[i] for i in range(2)}
    return {n: layer.get_delta_weight(name).detach() for n, layer in layers.items()}


WEIGHTS = [0.5, 1.7, -0.4]


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd", "magnitude_prune_svd", "dare_linear_svd", "dare_ties_svd"])
def test_peft_agrees(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folders = peft_model(tmp_path, (2, 3, 2) if kind in ("cat", "svd") else (2, 2, 2))
    ours_of = {
        "cat": ("stack", {}),
        "svd": ("task_arithmetic", {}),
        "ties_svd": ("ties", {"density": 0.4, "definition": "peft"}),
        "magnitude_prune_svd": ("magnitude", {"density": 0.4}),
        "dare_linear_svd": ("dare", {"density": 0.4, "seed": 3}),
        "dare_ties_svd": ("dare_ties", {"density": 0.4, "seed": 3, "definition": "peft"}),
    }
    method, options = ours_of[kind]
    # PEFT draws its masks from the global stream, adapter after adapter, layer after layer: give it ours.
    draws = iter([(t, f"{i}.weight") for i in range(2) for t in range(3)])

    def same_mask(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        mask = draw_mask(density, tensor, generator_for(3, *next(draws)))
        return tensor * mask / density if rescale else tensor * mask

    monkeypatch.setattr(merge_utils, "random_pruning", same_mask)
    rank = 5
    extra = {} if kind == "cat" else {"svd_rank": rank}
    density = {"density": 0.4} if "density" in options else {}
    names = [f"a{t}" for t in range(3)]
    model.add_weighted_adapter(names, WEIGHTS, "merged", combination_type=kind, **extra, **density)
    ours = merge([read_peft(f) for f in folders], WEIGHTS, method, same_base=False, **options)
    for name, theirs in delta_of(model, "merged").items():
        got = ours[name] if kind == "cat" else squeeze(ours[name], rank).delta
        assert_close(got.dense(), theirs, 2e-6)  # float32 on both sides


@pytest.mark.parametrize("kind", ["linear", "ties", "magnitude_prune"])
def test_pefts_factorwise_merges_are_named_as_such(kind: str, tmp_path: Path) -> None:
    """PEFT's modes without _svd act on A and on B apart: here that is a merge of factors, never of deltas."""
    model, folders = peft_model(tmp_path)
    weights = [0.5, 1.7, 0.4]
    density = {} if kind == "linear" else {"density": 0.4}
    model.add_weighted_adapter(["a0", "a1", "a2"], weights, "merged", combination_type=kind, **density)
    method = {"linear": "task_arithmetic", "ties": "ties", "magnitude_prune": "magnitude"}[kind]
    options = density | ({"definition": "peft"} if kind == "ties" else {})
    lazy = [read_peft(f) for f in folders]
    roots = [(w * 3 / 2) ** 0.5 for w in weights]  # alpha / r = 3 / 2; √(w s) on either factor
    for name, theirs in delta_of(model, "merged").items():
        parts = [adapter[name] for adapter in lazy]
        separate = [{"A": p.down, "B": p.up * 2 / 3} for p in parts]  # type: ignore[attr-defined]
        merged = merge(separate, roots, method, **options)
        assert_close(merged["B"].dense() @ merged["A"].dense(), theirs, 2e-6)
        if kind == "linear":
            deltas_merged = merge(lazy, weights, "task_arithmetic", same_base=False)[name].dense()
            assert float((deltas_merged - theirs).norm() / deltas_merged.norm()) > 0.2


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_do_not_match_are_refused(method: str) -> None:
    sets = adapters(2)
    with pytest.raises(ConfigError, match="3 weights for 2 adapters"):
        merge(sets, [1.0, 2.0, 3.0], method, **NEEDED.get(method, {}))
    with pytest.raises(ConfigError, match="finite"):
        merge(sets, [1.0, float("inf")], method, **NEEDED.get(method, {}))
    if METHODS[method].weights == "none":
        with pytest.raises(ConfigError, match="takes no weights"):
            merge(sets, [1.0, 2.0], method, **NEEDED.get(method, {}))


def test_unknown_names_are_answered_with_the_nearest() -> None:
    sets = adapters()
    for kwargs, match in (
        ({"method": "tie"}, "Did you mean 'ties'"),
        ({"method": "ties", "densty": 0.2}, "unknown option 'densty' in method 'ties'. Did you mean 'density'"),
        ({"method": "ties", "definition": "pefft"}, "Did you mean 'peft'"),
        ({"method": "average", "density": 0.2}, "unknown option 'density'"),
        ({"method": "dare"}, "needs density="),
        ({"missing": "zeros"}, "Did you mean 'zero'"),
        ({"method": "dare", "density": "half"}, "density must be a number, got 'half'"),
        ({"method": "dare", "density": [0.5, 0.5]}, "one per adapter"),
        ({"method": "ties", "density": 0.0}, "density is 0.0"),
        ({"method": "emr", "task": 3}, "expected 0 … 2"),
    ):
        with pytest.raises(ConfigError, match=match.replace("(", r"\(")):
            merge(sets, **kwargs)  # type: ignore[arg-type]


def test_no_adapters_and_no_tensors() -> None:
    with pytest.raises(ConfigError, match="got none"):
        merge([])
    with pytest.raises(ConfigError, match="got one mapping"):
        merge(adapters()[0])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="hold no tensors"):
        merge([{}, {}])


def test_adapters_for_another_base_are_refused(tmp_path: Path) -> None:
    pair = {"m": (torch.ones(2, 4), torch.ones(3, 2))}
    one = read_peft(lora_folder(tmp_path / "one", pair, base_model_name_or_path="org/base-a"))
    two = read_peft(lora_folder(tmp_path / "two", pair, base_model_name_or_path="org/base-b"))
    with pytest.raises(ConfigError, match=r"two changes the base 'org/base-b', .*one changes 'org/base-a'"):
        merge([one, two], method="average")
    assert set(merge([one, two], method="average", same_base=False)) == {"m.weight"}
    assert merge_lazily([one, one], method="average").base == "org/base-a"


def test_another_bases_shapes_are_refused() -> None:
    sets = adapters(2)
    sets[1]["0.q"] = factors(2, 7, 6)
    with pytest.raises(ShapeError, match=r"'0.q' has another shape .*\(7, 5\).*\(7, 6\)"):
        merge(sets, method="average")


def test_adapters_for_other_targets_are_refused_or_counted_as_no_change() -> None:
    sets = adapters(2)
    del sets[1]["1.v"]
    with pytest.raises(ConfigError, match=r"adapter 1 has no delta for '1.v'.*missing='zero'"):
        merge(sets, method="average")
    got = merge(sets, method="average", missing="zero")
    assert_close(got["1.v"].dense(), sets[0]["1.v"].dense() / 2, 1e-13)
    for method in METHODS:
        if method in ("average_factors", "model_stock", "slerp"):
            continue
        options = {k: v[:2] if isinstance(v, list) else v for k, v in NEEDED.get(method, {}).items()}
        assert merge(sets, method=method, missing="zero", **options)["1.v"].finite()


def test_unequal_ranks_where_equal_ones_are_needed() -> None:
    sets = [*adapters(1, rank=2), *adapters(1, rank=3)]
    with pytest.raises(ConfigError, match=r"ranks \[2, 3\].*use average"):
        merge(sets, method="average_factors")
    merge(sets, method="average")
    dense = [{"w": m} for m in matrices()]
    for method in ("stack", "average_factors"):
        with pytest.raises(ConfigError, match="is dense in 3 of 3"):
            merge(dense, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_nan_in_a_delta_names_tensor_and_adapter(method: str) -> None:
    sets = adapters(2)
    sets[1]["1.v"].up[0, 0] = float("nan")
    options = {k: v[:2] if isinstance(v, list) else v for k, v in NEEDED.get(method, {}).items()}
    with pytest.raises(NumericsError, match=r"'1.v' from adapter 1 holds NaN or infinity"):
        merge(sets, method=method, **options)


def test_every_error_is_moas_own() -> None:
    for error in (ConfigError, ShapeError, NumericsError):
        assert issubclass(error, MoaError)


def test_half_precision_and_mixed_types_are_widened() -> None:
    base = {"w": torch.randn(4, 3).bfloat16()}
    lazy = [difference({"w": base["w"] + s}, base) for s in (0.5, 1.0)]
    got = merge(lazy, method="average")["w"]
    assert got.dtype == torch.float32
    mixed = merge([{"w": torch.ones(2, 2)}, {"w": torch.ones(2, 2).double()}], method="average")["w"]
    assert mixed.dtype == torch.float64


def test_one_threshold_over_two_types_is_refused() -> None:
    sets = [{"a": torch.ones(2, 2), "b": torch.ones(2, 2).double()}] * 2
    with pytest.raises(ShapeError, match=r"scope='tensor'"):
        merge(sets, method="ties")
    mixed = [{"a": torch.tensor([[3.0, 1.0]])}, {"a": torch.tensor([[1.0, 3.0]]).double()}]
    assert_close(merge(mixed, method="ties", density=0.5)["a"].dense(), torch.tensor([[3.0, 3.0]]), 1e-13)
