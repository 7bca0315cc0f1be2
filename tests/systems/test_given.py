"""Routers over PEFT adapters that exist: X-LoRA and Arrow against peft's own, gates with the adapters frozen.

Run: pytest tests/systems/test_given.py
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import moa
from moa.errors import CheckpointError, ConfigError, ContextError
from moa.recipes import RECIPES
from moa.routers.prototype import top_right_singular
from tests import models
from tests.laws import assert_close

from . import adapters

# peft calls what transformers 5 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three adapters for the tiny Llama."""
    return adapters.write(tmp_path, models.llama)


def tokens(rows: int = 3, length: int = 6) -> Tensor:
    return models.token_batch(rows, length)["input_ids"].clamp(min=2)


# ------------------------------------------------------------------------------------------------ X-LoRA


def pefts_xlora(folders: list[Path], **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = models.llama()
        base.config.use_cache = False
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=models.WIDTH,
            adapters={str(i): str(path) for i, path in enumerate(folders)},
            **options,
        )
        return peft.get_peft_model(base, config).eval()


@pytest.mark.parametrize("layerwise", [False, True], ids=["shared", "layerwise"])
@pytest.mark.parametrize("top", [None, 2])
def test_xlora_is_pefts(folders: list[Path], layerwise: bool, top: int | None) -> None:
    theirs = pefts_xlora(folders, layerwise_scalings=layerwise, top_k_lora=top, softmax_temperature=0.7)
    ours = moa.build(models.llama(), "xlora", experts=folders, k=top or 3, layerwise=layerwise, temperature=0.7).eval()
    linear = theirs.base_model.internal_xlora_classifier.layers[-1]
    with torch.no_grad():
        nn.init.normal_(linear.weight)
        nn.init.normal_(linear.bias)
        routers = list({id(b.router.classifier): b.router.classifier for _, b in ours.branches()}.values())
        assert len(routers) == (len(ours.mixtures()) if layerwise else 1)
        for number, router in enumerate(routers):
            rows = slice(3 * number, 3 * number + 3) if layerwise else slice(0, 3)
            router.layers[0].weight.copy_(linear.weight[rows])
            router.layers[0].bias.copy_(linear.bias[rows])
    ids = tokens()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert_close(models.outputs_of(ours, {"input_ids": ids}), expected, 1e-5)
    with ours.disable_adapter():
        assert not torch.allclose(models.outputs_of(ours, {"input_ids": ids}), expected, atol=1e-3)


def randomised_xlora(folders: list[Path], **options: Any) -> Any:
    return models.randomise(moa.build(models.llama(), "xlora", experts=folders, **options), scale=1.0).eval()


def test_only_the_classifier_trains(folders: list[Path]) -> None:
    model = moa.build(models.llama(), "xlora", experts=folders)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 and all(".routers.layers.0." in n for n in names)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model.train()
    for _ in range(3):
        model(**models.lm_batch()).loss.backward()
        optimizer.step()
    assert all(torch.equal(model.get_parameter(n), p) for n, p in before.items())
    layerwise = moa.build(models.llama(), "xlora", experts=folders, layerwise=True)
    assert len([1 for p in layerwise.parameters() if p.requires_grad]) == 2 * len(layerwise.mixtures())


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generation_with_a_cache_is_generation_without(folders: list[Path], strategy: dict[str, int]) -> None:
    """The first pass has its own cache, which beam search reorders too."""
    model = randomised_xlora(folders)
    prompt = tokens()
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt), **strategy}
    cached = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(prompt, **options))


def test_each_decoding_step_sees_one_token(folders: list[Path]) -> None:
    model = randomised_xlora(folders)
    lengths: list[int] = []
    model.base.model.embed_tokens.register_forward_hook(lambda m, args, out: lengths.append(out.shape[1]))
    model.generate(tokens(), max_new_tokens=4, do_sample=False)
    assert lengths == [6, 6, 1, 1, 1, 1, 1, 1], "prompt twice, then each new token twice"


def test_padding_and_prompt_length_change_nothing(folders: list[Path]) -> None:
    model = randomised_xlora(folders)
    ids = tokens(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    with_padding = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(with_padding[:, 3:], alone)


def test_a_cache_of_unknown_origin_is_an_error(folders: list[Path]) -> None:
    model = randomised_xlora(folders)
    with torch.no_grad():
        cache = model(tokens(), use_cache=True).past_key_values
        with pytest.raises(ContextError, match="first pass has not seen what this cache holds"):
            model(tokens()[:, :1], past_key_values=cache)
    with pytest.raises(ContextError, match="there was none"):
        mixture = next(iter(model.mixtures().values()))
        model.context.preview = ()
        mixture(torch.randn(2, 3, 16))


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2"])
def test_xlora_on_other_models(kind: str, tmp_path: Path) -> None:
    make, make_batch = models.MODELS[kind]
    targets = {"bert": ["query", "dense"], "vit": ["q_proj", "fc1"], "gpt2": ["c_attn", "c_proj"]}[kind]
    if kind == "vit":
        names = {n.rsplit(".", 1)[-1] for n, m in make().named_modules() if isinstance(m, nn.Linear)}
        targets = sorted(names - {"classifier"})[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = adapters.write(tmp_path, make, targets=targets)
    model = moa.build(make(), "xlora", experts=folders)
    batch = make_batch()
    model.train()
    model(**batch).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if p.requires_grad and ".routers." in n]
    assert grads and all(g is not None and bool(g.any()) for g in grads)
    model.save_pretrained(tmp_path / "saved")
    again = moa.load(tmp_path / "saved", base=make())
    assert torch.equal(models.outputs_of(again, batch), models.outputs_of(model, batch))


@pytest.mark.parametrize("keep", [1, 2, [0, 3]], ids=str)
def test_a_head_that_sees_some_tokens_has_their_routing(keep: Any, tmp_path: Path) -> None:
    """An adapter on the head reads the rows of the tokens whose logits are asked for; `generate` asks for the last."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = adapters.write(tmp_path, models.llama, targets=["q_proj", "lm_head"])
    model = models.randomise(moa.build(models.llama(), "xlora", experts=folders)).eval()
    ids = tokens()
    kept = torch.tensor(keep) if isinstance(keep, list) else keep
    with torch.no_grad():
        logits = model(ids).logits
        some = model(ids, logits_to_keep=kept).logits
    assert_close(some, logits[:, -keep:] if isinstance(keep, int) else logits[:, keep], 1e-6)
    grown = model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), grown)


def test_padding_of_a_head_that_sees_some_tokens_counts_for_nothing() -> None:
    """Losses of a router before the head are over the tokens that are real, of those that it sees."""
    model = moa.build(models.llama(), "topk", n_experts=4, k=2, targets=["lm_head"], balance=1.0)
    models.randomise(model).eval()
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0

    def counted(**also: Any) -> Tensor | None:
        with torch.no_grad(), model.tracing() as trace:
            model(ids, attention_mask=mask, **also)
        (record,) = trace
        return record.mask

    for kept, real in (({}, mask), ({"logits_to_keep": 3}, mask[:, -3:])):
        found = counted(**kept)
        assert found is not None and torch.equal(found, real.bool())


@pytest.mark.parametrize("name", ["Bart", "MBart", "Marian", "Pegasus", "Blenderbot", "PLBart"])
def test_a_decoder_inside_a_wrapper_has_a_first_pass(name: str, tmp_path: Path) -> None:
    """The decoder of an encoder-decoder by itself stands in a module whose forward has no named inputs."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=models.VOCAB, d_model=16, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32,
        max_position_embeddings=32, is_decoder=True, is_encoder_decoder=False, pad_token_id=0,
    )  # fmt: skip

    def make() -> nn.Module:
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = adapters.write(tmp_path, make, targets=["q_proj", "fc1"])
    model = models.randomise(moa.build(make(), "xlora", experts=folders)).eval()
    ids = tokens()
    seen: list[Tensor] = []
    (classifier,) = {branch.router.classifier for _, branch in model.branches()}
    classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
        assert_close(seen[0], make()(ids, output_hidden_states=True).hidden_states[-1], 1e-6)
    grown = model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), grown)


def test_deep_copies_share_nothing(folders: list[Path]) -> None:
    model = randomised_xlora(folders)
    twin = copy.deepcopy(model)
    ids = {"input_ids": tokens()}
    before = models.outputs_of(model, ids)
    models.randomise(twin, seed=9)
    assert torch.equal(models.outputs_of(model, ids), before)
    assert not torch.allclose(models.outputs_of(twin, ids), before, atol=1e-3)


# ------------------------------------------------------------------------------------------------ Arrow


def pefts_arrow(folders: list[Path], **options: Any) -> Any:
    config = peft.ArrowConfig(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.create_arrow_model(models.llama(), [str(f) for f in folders], config).eval()


@pytest.mark.parametrize(("k", "temperature"), [(3, 1.0), (2, 0.5), (1, 1.0)])
def test_arrow_is_pefts(folders: list[Path], k: int, temperature: float) -> None:
    theirs = pefts_arrow(folders, top_k=k, router_temperature=temperature, rng_seed=0)
    ours = moa.build(models.llama(), "arrow", experts=folders, k=k, temperature=temperature).eval()
    ids = tokens()
    with torch.no_grad():
        theirs(input_ids=ids)  # builds its prototypes
        for name, mixture in ours.mixtures().items():
            layer = theirs.base_model.model.get_submodule(name)
            own = layer.lora_arrow["arrow_router"]
            cosine = (own.prototypes * mixture.branches[0].router.prototypes).sum(1).abs()
            assert cosine.min() > 0.9, "peft's 15 power iterations are close to the exact vectors, not on them"
            own.prototypes.copy_(mixture.branches[0].router.prototypes)
        expected = theirs(input_ids=ids).logits
    assert_close(models.outputs_of(ours, {"input_ids": ids}), expected, 1e-5)


def test_prototypes_are_the_first_right_singular_vectors() -> None:
    down, up = torch.randn(5, 3, 20, dtype=torch.float64), torch.randn(5, 3, 12, dtype=torch.float64)
    found = top_right_singular((down, up))
    for e in range(5):
        vectors = torch.linalg.svd(up[e].T @ down[e]).Vh
        assert_close(found[e] * (found[e] @ vectors[0]).sign(), vectors[0], 1e-8)
    untrained = top_right_singular((down, up * 0))
    for e in range(5):
        assert abs(abs(untrained[e] @ torch.linalg.svd(down[e]).Vh[0]) - 1) < 1e-8
    assert not top_right_singular((down * 0, up)).any()


def test_arrow_needs_no_training_and_comes_back(folders: list[Path], tmp_path: Path) -> None:
    model = moa.build(models.llama(), "arrow", experts=folders)
    assert not any(p.requires_grad for p in model.parameters())
    ids = {"input_ids": tokens()}
    before = models.outputs_of(model, ids)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(models.outputs_of(moa.load(tmp_path / "saved", base=models.llama()), ids), before)
    with torch.no_grad():
        for _, branch in model.branches():
            branch.bank.down.copy_(branch.bank.down.flip(0))
            branch.bank.up.copy_(branch.bank.up.flip(0))
    assert not torch.allclose(models.outputs_of(model, ids), before, atol=1e-4)
    model.experts_changed()
    assert_close(models.outputs_of(model, ids), before, 1e-5)  # the same experts under other numbers


QKV = ("q_proj", "k_proj", "v_proj")


def one_up_to_sign(found: Tensor, right: Tensor) -> None:
    assert_close(found * (found @ right).sign(), right, 1e-5)


def test_tied_prototypes_are_those_of_the_changes_on_top_of_each_other(tmp_path: Path) -> None:
    """Against a dense singular value decomposition, and, for one A in q, k and v, against mttl's way written anew."""
    folders = adapters.write(tmp_path, models.llama, targets=[*QKV, "down_proj"])
    model = moa.build(models.llama(), "arrow", experts=folders, tied=QKV)
    alone = moa.build(models.llama(), "arrow", experts=folders)
    mixtures = {name: mixture.branches[0] for name, mixture in model.mixtures().items()}
    own = {name: mixture.branches[0].router.prototypes for name, mixture in alone.mixtures().items()}

    def check(with_one_a: bool) -> None:
        for number in range(2):
            names = [f"model.layers.{number}.self_attn.{name}" for name in QKV]
            banks = [mixtures[name].bank for name in names]
            for e in range(3):
                changes = [bank.up[e].T.double() @ bank.down[e].double() for bank in banks]  # (o, i) each
                if with_one_a:
                    a = banks[0].down[e].T.numpy().astype(float)  # (i, r), mttl's lora_a
                    b = np.concatenate([bank.up[e].numpy() for bank in banks], 1)  # (r, Σo), its lora_b side by side
                    right = torch.from_numpy(np.linalg.svd(a @ b, full_matrices=False)[0][:, 0]).float()
                else:
                    right = torch.linalg.svd(torch.cat(changes)).Vh[0].float()
                for name in names:
                    one_up_to_sign(mixtures[name].router.prototypes[e], right)

    check(with_one_a=False)
    for name, branch in mixtures.items():
        if name.endswith("down_proj"):
            assert torch.equal(branch.router.prototypes, own[name]), "the others have their own"
        else:
            assert not torch.allclose(branch.router.prototypes.abs(), own[name].abs(), atol=1e-2)
    with torch.no_grad():
        for number in range(2):
            first, *rest = (mixtures[f"model.layers.{number}.self_attn.{name}"].bank for name in QKV)
            for bank in rest:
                bank.down.copy_(first.down)
    model.experts_changed()
    check(with_one_a=True)


def test_tied_layers_choose_alike_and_come_back(tmp_path: Path) -> None:
    folders = adapters.write(tmp_path, models.llama, targets=QKV)
    model = moa.build(models.llama(), "arrow", experts=folders, tied=list(QKV), k=1).eval()
    with model.tracing() as trace:
        models.outputs_of(model, {"input_ids": tokens()})
    q, k, v, *_ = (record.routing.indices for record in trace)
    assert torch.equal(q, k) and torch.equal(q, v)
    model.save_pretrained(tmp_path / "saved")
    again = moa.load(tmp_path / "saved", base=models.llama())
    assert again.recipes[0][0].tied == QKV
    ids = {"input_ids": tokens()}
    assert torch.equal(models.outputs_of(again, ids), models.outputs_of(model, ids))
    again.experts_changed()
    assert torch.equal(models.outputs_of(again, ids), models.outputs_of(model, ids))


def test_an_expert_untrained_in_some_tied_layers() -> None:
    """Zero in one layer: the other decides; zero in all: what the downs amplify most; nothing at all: zero."""
    down, up = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    other = torch.randn(2, 2, 8, dtype=torch.float64), torch.zeros(2, 2, 6, dtype=torch.float64)
    assert_close(top_right_singular((down, up), other).abs(), top_right_singular((down, up)).abs(), 1e-9)
    both = torch.linalg.svd(torch.cat([down, other[0]], 1)).Vh[:, 0]
    assert_close(top_right_singular((down, up * 0), other).abs(), both.abs(), 1e-9)
    assert not top_right_singular((down * 0, up), (other[0] * 0, other[1])).any()


def test_tied_names_that_fit_nothing(tmp_path: Path) -> None:
    folders = adapters.write(tmp_path, models.llama, targets=["q_proj", "up_proj", "down_proj"])
    with pytest.raises(ConfigError, match=r"tied=\('q_proj', 'k_proj'\) names no two layers.*self_attn.q_proj"):
        moa.build(models.llama(), "arrow", experts=folders, tied=("q_proj", "k_proj"))
    with pytest.raises(ConfigError, match=r"route rows of one size, got .*up_proj \(16\), .*down_proj \(24\)"):
        moa.build(models.llama(), "arrow", experts=folders, tied=("up_proj", "down_proj"))
    for tied in ("q_proj", ("q_proj",)):
        with pytest.raises(ConfigError, match="at least two layers"):
            moa.build(models.llama(), "arrow", experts=folders, tied=tied)


# ------------------------------------------------------------------------------------------------ gates over adapters


@pytest.mark.parametrize("router", ["topk", "remix", "dense", "switch"])
def test_gates_learn_while_the_adapters_stay(folders: list[Path], router: str) -> None:
    model = moa.build(models.llama(), router, experts=folders)
    assert adapters.frozen(model)
    experts = {n: p.clone() for n, p in model.adapter_state_dict().items() if ".bank." in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    gates = {n: p.clone() for n, p in model.adapter_state_dict().items() if ".router." in n}
    model.train()
    for _ in range(2):
        model(**models.lm_batch()).loss.backward()
        optimizer.step()
    after = model.adapter_state_dict()
    assert all(torch.equal(after[n], p) for n, p in experts.items())
    assert any(not torch.equal(after[n], p) for n, p in gates.items())
    assert not adapters.frozen(moa.build(models.llama(), router, experts=folders, train_experts=True))


def test_frozen_experts_stay_frozen_after_loading(folders: list[Path], tmp_path: Path) -> None:
    moa.build(models.llama(), "topk", experts=folders).save_pretrained(tmp_path / "saved")
    assert adapters.frozen(moa.load(tmp_path / "saved", base=models.llama()))


# recipe -> what it says of adapters that exist; the others take them, of whatever rank
REFUSED = {
    "soft": "experts are SlotBank: choose another",
    "hydralora": "experts are SharedLoRABank: choose another",
    "poly": "experts are HeadedLoRABank: choose another",
    "mhr": "experts are HeadedLoRABank: choose another",
    "flylora": "the rank is the number of experts",
    "hydra": "n_experts=3 needs gate='experts'",
    "mixlora": "no feed-forward block",
}


@pytest.mark.parametrize("router", list(RECIPES))
def test_adapters_of_unequal_rank_and_scale(router: str, tmp_path: Path) -> None:
    """Padded with zeros and rescaled, which is exact: pinned to one adapter, the model is peft's with that adapter.

    Recipes that do not mix the outputs of LoRAs say so.
    """
    folders = adapters.write(tmp_path, models.llama, ranks=(2, 4, 8))
    if router in REFUSED:
        base = models.llama()
        with pytest.raises(ConfigError, match=REFUSED[router]):
            moa.build(base, router, experts=folders)
        assert not any(isinstance(m, moa.Mixture) for m in base.modules()), "half built"
        return
    model = moa.build(models.llama(), router, experts=folders).eval()
    ids = {"input_ids": tokens()}
    for number, folder in enumerate(folders):
        theirs = peft.PeftModel.from_pretrained(models.llama(), folder).eval()
        with torch.no_grad(), model.pin_expert(number):
            assert_close(models.outputs_of(model, ids), theirs(**ids).logits, 1e-5)


def test_a_mixture_of_unequal_ranks_is_the_sum_of_pefts_deltas(tmp_path: Path) -> None:
    """Not each alone, but together: 1/3 of every adapter's own weight change, which peft merges."""
    folders = adapters.write(tmp_path, models.llama, ranks=(2, 4, 8))
    model = moa.build(models.llama(), "fixed", experts=folders)
    plain = models.llama().state_dict()
    merged = [peft.PeftModel.from_pretrained(models.llama(), path).merge_and_unload() for path in folders]
    for name, mixture in model.mixtures().items():
        key = f"{name}.weight"
        expected = sum(m.state_dict()[key] - plain[key] for m in merged) / 3
        assert_close(moa.fold(mixture).weight - plain[key], expected, 1e-5, name)


def test_experts_that_a_layer_has_no_place_for(tmp_path: Path) -> None:
    """MixLoRA has one plain LoRA outside its blocks: several adapters do not fit there."""
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    folders = adapters.write(tmp_path, models.llama, targets=targets)
    with pytest.raises(ConfigError, match=r"q_proj has 1 expert\(s\) in this recipe, and 3 adapters were given"):
        moa.build(models.llama(), "mixlora", experts=folders)
    ffn = adapters.write(tmp_path / "ffn", models.llama, targets=targets[1:], ranks=(2, 4, 8))
    model = moa.build(models.llama(), "mixlora", experts=ffn).eval()
    ids = {"input_ids": tokens()}
    for number, folder in enumerate(ffn):
        theirs = peft.PeftModel.from_pretrained(models.llama(), folder).eval()
        with torch.no_grad(), model.pin_expert(number):
            assert_close(models.outputs_of(model, ids), theirs(**ids).logits, 1e-5)


def test_bad_inputs(folders: list[Path], tmp_path: Path) -> None:
    other = adapters.write(tmp_path / "other", lambda: models.llama(head_dim=16), n=1)
    for error, router, options, text in (
        (ConfigError, "xlora", {}, "router='xlora' is for adapters that exist already"),
        (ConfigError, "arrow", {}, "router='arrow' is for adapters that exist already"),
        (
            ConfigError,
            "xlora",
            {"experts": folders, "n_experts": 4},
            "n_experts=4 was asked for, but the adapters given have 3",
        ),
        (ConfigError, "xlora", {"experts": folders, "depth": 0}, "depth must be at least 1"),
        (ConfigError, "arrow", {"experts": folders, "temperature": 0.0}, "temperature must be positive"),
        (CheckpointError, "arrow", {"experts": other}, "made for another base"),
        (CheckpointError, "topk", {"experts": [tmp_path], "k": 1}, "not an adapter folder"),
    ):
        base = models.llama()
        with pytest.raises(error, match=text):
            moa.build(base, router, **options)
        assert not any(isinstance(m, moa.Mixture) for m in base.modules()), "half built"
