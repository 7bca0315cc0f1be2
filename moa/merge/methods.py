"""The table of merging methods: one row each, with its paper, its definition and its keywords.

Papers: in the rows. `merge` itself is in `moa.merge.run`.
Differs: where a row takes `definition`, "mergekit" gives what mergekit 0.1.5 computes, with its defaults (density 1,
DELLA's ε 0.15; agreeing weights divide in ties and della only). What stays different is said by `agreeing_sum`,
`drop_random` and `keep_probabilities`. mergekit's `rescale` of ties and breadcrumbs is not offered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..delta import Delta, Dense
from ..errors import ConfigError
from .average import average_factors, model_stock, slerp
from .compose import normalised, stack
from .consensus import weighted_sum
from .data_aware import AdaMerged, adamerge, fisher, regmean
from .elect import elect, magnitudes, rescalers
from .fly import fly_shared, shares_down
from .jobs import Job, Method, Plan, elementwise, low_rank_only, sparsified, thresholds, vote
from .options import BY_RANK, DENSITY, MIDDLE, RANDOM, REQUIRED, RESCALE, SCALE, SCOPE, SEED, SUMMED_VOTE, VOTE, Option
from .subspace import has_room, is_matrix, isotropic, knots, task_singular_vectors, total


def _stack(job: Job) -> Delta:
    return stack(low_rank_only(job), job.weights)


def _slerp(job: Job) -> Delta:
    base = job.options["base"]
    if base is not None and job.name not in base:
        raise ConfigError(f"slerp: base holds no weight {job.name!r}, and a delta changes it.")
    return slerp(job.deltas, job.weights, base=None if base is None else base[job.name])


def _flylora(job: Job) -> Delta:
    return fly_shared(job.deltas, job.weights) if shares_down(job.deltas) else total(job.deltas, job.weights)


def _knots(job: Job) -> Delta:
    def combine(parts: Sequence[Tensor]) -> Tensor:
        stream = sparsified(job, parts)
        return vote(job, stream) if job.options["agree"] else weighted_sum(stream(), job.weights)

    return knots(job.deltas, combine, share=job.options["share"]).scaled(job.options["scale"])


def _tsv(job: Job) -> Delta:
    return task_singular_vectors(job.deltas, job.weights, rank=job.options["rank"]).scaled(job.options["scale"])


def _isotropic(job: Job) -> Delta:
    return isotropic(job.deltas, job.weights).scaled(job.options["scale"])


def _statistics(job: Job, key: str) -> list[Tensor] | None:
    """Return every adapter's statistic of one tensor, None if no adapter has it."""
    given: Sequence[Mapping[str, Tensor]] = job.options[key]
    if len(given) != len(job.deltas):
        raise ConfigError(f"{job.plan.method.name}: {key} holds {len(given)} mappings for {len(job.deltas)} adapters.")
    found = [statistics[job.name] for statistics in given if job.name in statistics]
    if found and len(found) < len(given):
        raise ConfigError(
            f"{job.plan.method.name}: {key} has {job.name!r} for {len(found)} of {len(given)} adapters; give it for "
            "all, or for none to average that tensor."
        )
    return found or None


def _average(job: Job) -> Delta:
    return total(job.deltas, normalised(job.weights, job.plan.method.name))


def _regmean(job: Job) -> Delta:
    grams = _statistics(job, "grams")
    if grams is None:
        return _average(job)
    return regmean(job.deltas, job.weights, grams, shrink=job.options["shrink"])


def _fisher(job: Job) -> Delta:
    diagonals = _statistics(job, "fishers")
    if diagonals is None:
        return _average(job)
    return fisher(job.deltas, job.weights, diagonals, floor=job.options["floor"])


def _learn(plan: Plan) -> AdaMerged:
    options = plan.options
    parts = {name: plan.aligned(name) for name in plan.names}
    return adamerge(
        [{name: part[t] for name, part in parts.items()} for t in range(len(plan.adapters))],
        options["loss"],
        layer_of=options["layer_of"],
        init=options["init"],
        steps=options["steps"],
        lr=options["lr"],
    )


def _adamerging(job: Job) -> Delta:
    learnt: AdaMerged = job.state
    row = learnt.coefficients
    if learnt.layers:
        row = row[learnt.layers.index(job.options["layer_of"](job.name))]
    return total(job.deltas, row.tolist())


def _emr_scales(plan: Plan) -> Tensor:
    task = plan.options["task"]
    if not isinstance(task, int) or not 0 <= task < len(plan.adapters):
        raise ConfigError(f"emr: task is {task!r}, expected 0 … {len(plan.adapters) - 1}.")
    sums = torch.zeros(2, len(plan.adapters), dtype=torch.float64)
    for name in plan.names:
        stacked = torch.stack([d.dense() for d in plan.aligned(name)])
        sums += magnitudes(stacked, *elect(stacked))
    return rescalers(sums)


def _emr(job: Job) -> Delta:
    unified, agree = elect(torch.stack([d.dense() for d in job.deltas]))
    task = job.options["task"]
    return Dense(agree[task] * unified * float(job.state[task]))


def _table(*rows: Method) -> dict[str, Method]:
    return {row.name: row for row in rows}


METHODS: dict[str, Method] = _table(
    Method(
        "average",
        "Wortsman et al. 2022, arXiv 2203.05482 (model soups)",
        "Σ w_t δ_t / Σ w_t; low-rank stays low-rank, exactly",
        elementwise,
        weights="normalised",
        keeps_factors=True,
    ),
    Method(
        "task_arithmetic",
        "Ilharco et al. 2022, arXiv 2212.04089",
        "λ Σ w_t δ_t; low-rank stays low-rank, exactly",
        elementwise,
        {"scale": SCALE},
        keeps_factors=True,
    ),
    Method(
        "stack",
        "Wang et al. 2024, arXiv 2409.05976 (FLoRA)",
        "Σ w_t δ_t as factors of rank Σ r_t, exactly; refuses dense deltas",
        _stack,
        keeps_factors=True,
    ),
    Method(
        "magnitude",
        "only the trim of TIES (arXiv 2306.01708)",
        "λ Σ w_t top(δ_t)",
        elementwise,
        {"density": DENSITY, "scope": SCOPE, "scale": SCALE},
        prepare=thresholds,
        sparsify="magnitude",
    ),
    Method(
        "ties",
        "Yadav et al. 2023, arXiv 2306.01708",
        "λ · (agreeing part of top(δ_t)): see moa.merge.consensus.agreeing_sum for the three definitions",
        elementwise,
        {"density": dataclasses.replace(DENSITY, default=0.2), "scope": SCOPE, **VOTE, "scale": SCALE},
        prepare=thresholds,
        sparsify="magnitude",
        agree=True,
    ),
    Method(
        "dare",
        "Yu et al. 2023, arXiv 2311.03099",
        "λ Σ w_t m_t ⊙ δ_t / density, m_t random; mergekit: each m_t ⊙ δ_t scaled to ‖δ_t‖₁",
        elementwise,
        RANDOM,
        sparsify="random",
    ),
    Method(
        "dare_ties",
        "Yu et al. 2023, arXiv 2311.03099, with the sign election of TIES in place of its trim",
        "λ · (agreeing part of m_t ⊙ δ_t / density)",
        elementwise,
        {**RANDOM, **SUMMED_VOTE},
        sparsify="random",
        agree=True,
    ),
    Method(
        "della",
        "Deep et al. 2024, arXiv 2406.11617",
        "λ · (agreeing part of m_t ⊙ δ_t / keep), small entries of a row likelier dropped",
        elementwise,
        {**BY_RANK, **VOTE},
        sparsify="rank",
        agree=True,
    ),
    Method(
        "della_linear",
        "Deep et al. 2024, arXiv 2406.11617, without the election",
        "λ Σ w_t m_t ⊙ δ_t / keep",
        elementwise,
        BY_RANK,
        sparsify="rank",
    ),
    Method(
        "breadcrumbs",
        "Davari and Belilovsky 2023, arXiv 2312.06795",
        "λ Σ w_t middle(δ_t), per tensor",
        elementwise,
        MIDDLE,
        sparsify="middle",
    ),
    Method(
        "breadcrumbs_ties",
        "Davari and Belilovsky 2023, arXiv 2312.06795, with the sign election of TIES",
        "λ · (agreeing part of middle(δ_t))",
        elementwise,
        {**MIDDLE, **SUMMED_VOTE},
        sparsify="middle",
        agree=True,
    ),
    Method(
        "slerp",
        "Shoemake 1985",
        "the arc between two deltas at t = w_1 / (w_0 + w_1); with base= between the full weights",
        _slerp,
        {"base": Option(None, "name -> W, to interpolate W + δ as mergekit's slerp does")},
        keeps_factors=True,
    ),
    Method(
        "model_stock",
        "Jang et al. 2024, arXiv 2403.19522",
        "N cos θ / (1 + (N - 1) cos θ) · mean δ_t, per tensor",
        lambda job: model_stock(job.deltas),
        weights="none",
        keeps_factors=True,
    ),
    Method(
        "average_factors",
        "Ponti et al. 2022, arXiv 2202.13914 (Poly); Caccia et al. 2022, arXiv 2211.03831 (MHR-μ)",
        "(Σ w_t up_t)(Σ w_t down_t) / (Σ w_t)²: the factors averaged, NOT the deltas",
        lambda job: average_factors(low_rank_only(job), job.weights),
        weights="normalised",
        keeps_factors=True,
    ),
    Method(
        "flylora_dense",
        "Zou et al. 2025, arXiv 2510.08396, eq. 12",
        "Σ w_t δ_t / Σ w_t, top-k dropped; one shared down factor keeps the rank (see moa.merge.fly_stack for top-k)",
        _flylora,
        weights="normalised",
        keeps_factors=True,
    ),
    Method(
        "knots",
        "Stoica et al. 2024, arXiv 2410.19735",
        "U · combine(Σ V_tᵀ), [δ_1 … δ_n] = U Σ [V_1ᵀ … V_nᵀ]; combine: sparsify × agree",
        _knots,
        {
            "sparsify": Option("magnitude", "how V_t is sparsified", ("magnitude", "random", "none")),
            "agree": Option(True, "elect signs; False sums"),
            "density": Option(1.0, DENSITY.doc),
            "seed": SEED,
            "rescale": RESCALE,
            "share": Option("scaled", "combine Σ V_tᵀ, or V_tᵀ with Σ put back after", ("scaled", "plain")),
            **VOTE,
            "scale": SCALE,
        },
        fits=is_matrix,
        keeps_factors=True,
    ),
    Method(
        "tsv",
        "Gargiulo et al. 2024, arXiv 2412.00081",
        "λ Û Σ V̂ᵀ: top singular triplets of each task, orthogonalised across tasks",
        _tsv,
        {"rank": Option(None, "triplets per task; min(o, i) / n if None"), "scale": SCALE},
        fits=has_room,
        keeps_factors=True,
    ),
    Method(
        "isotropic",
        "Marczak et al. 2025, arXiv 2502.04959 (ISO-C)",
        "λ σ̄ U Vᵀ of Σ w_t δ_t = U Σ Vᵀ",
        _isotropic,
        {"scale": SCALE},
        fits=is_matrix,
        keeps_factors=True,
    ),
    Method(
        "regmean",
        "Jin et al. 2022, arXiv 2212.09849",
        "(Σ w_t δ_t G̃_t)(Σ w_t G̃_t)⁻¹; tensors without Gram matrices are averaged",
        _regmean,
        {
            "grams": Option(REQUIRED, "one mapping per adapter, name -> XᵀX (i, i): see moa.merge.gram"),
            "shrink": Option(0.9, "share of the off-diagonal kept, [0, 1]"),
        },
        fits=is_matrix,
    ),
    Method(
        "fisher",
        "Matena and Raffel 2021, arXiv 2111.09832",
        "Σ w_t F_t ⊙ δ_t / Σ w_t F_t; tensors without Fisher diagonals are averaged",
        _fisher,
        {
            "fishers": Option(REQUIRED, "one mapping per adapter, name -> mean squared gradient of the weight's shape"),
            "floor": Option(1e-6, "added to every F"),
        },
    ),
    Method(
        "adamerging",
        "Yang et al. 2023, arXiv 2310.02575",
        "Σ λ_t δ_t, λ learnt on a loss; layer-wise with layer_of=",
        _adamerging,
        {
            "loss": Option(
                REQUIRED, "merged change, name -> ΔW, to a scalar (the paper: entropy on unlabelled inputs)"
            ),
            "layer_of": Option(None, "name -> layer; None learns one λ per task"),
            "init": Option(0.3, "start of every λ"),
            "steps": Option(500, "Adam steps"),
            "lr": Option(1e-3, "Adam's rate"),
        },
        weights="none",
        prepare=_learn,
        keeps_factors=True,
    ),
    Method(
        "emr",
        "Huang et al. 2024, arXiv 2405.17461",
        "λ_t M_t ⊙ τ of one task; moa.merge.emr keeps the parts of all tasks",
        _emr,
        {"task": Option(REQUIRED, "which task's delta to rebuild")},
        weights="none",
        prepare=_emr_scales,
    ),
)
