"""`moa.build`: every kind of model, several recipes, all that can go wrong. Run: pytest tests/model/test_build.py"""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import moa
from moa.errors import ConfigError, UnadaptedWarning
from moa.mixture.mixture import Mixture
from moa.recipes import RECIPES, make_recipe, recipe_class, register_recipe
from tests import models


@pytest.mark.parametrize("kind", list(models.MODELS))
def test_any_model_trains(kind):
    make, make_batch = models.MODELS[kind]
    model = moa.build(make(), "topk", n_experts=4, k=2, rank=2).train()
    batch = make_batch()
    out = model(**batch)
    loss = out.loss if hasattr(out, "loss") else out[0]
    assert set(model.last_losses) == {"task", "balance", "z"}
    loss.backward()
    for name, parameter in model.named_parameters():
        whole = any(name.startswith(f"base.{head}.") for head in model.modules_to_save)
        assert parameter.requires_grad == (".branches." in name or whole), name
        if ".bank.up" in name or ".router." in name:
            assert bool(parameter.grad.any()), name


def test_the_forward_names_what_the_base_takes():
    """Trainer drops the columns that the signature does not name."""
    names = set(inspect.signature(moa.build(models.bert(), "topk").forward).parameters)
    assert {"input_ids", "attention_mask", "token_type_ids", "labels", "task_ids", "num_items_in_batch"} <= names
    assert "pixel_values" in inspect.signature(moa.build(models.vit(), "topk").forward).parameters
    plain = inspect.signature(moa.build(models.plain(), "topk").forward).parameters
    assert next(iter(plain)) == "x" and "labels" in plain


def test_only_adapters_routers_and_new_heads_are_trained():
    model = moa.build(models.bert(), "topk", n_experts=4, rank=2)
    assert model.modules_to_save == ["classifier"]
    trainable, total = model.get_nb_trainable_parameters()
    per_layer = [
        4 * (2 * (s.base.in_features + s.base.out_features) + s.base.in_features) for s in model.mixtures().values()
    ]
    assert trainable == sum(per_layer) + (models.WIDTH + 1) * models.CLASSES
    assert total == trainable + sum(p.numel() for p in models.bert().bert.parameters())
    assert moa.build(models.llama(), "topk").modules_to_save == []


def test_modules_to_save():
    model = moa.build(models.bert(), "topk", modules_to_save=["bert.pooler"])
    assert model.base.bert.pooler.dense.weight.requires_grad
    assert not model.base.classifier.weight.requires_grad
    assert "bert.pooler.dense" not in model.mixtures()
    assert moa.build(models.bert(), "topk", modules_to_save=[]).modules_to_save == []


def test_modules_to_save_of_a_further_recipe_are_trained_too():
    model = moa.build(models.llama(), "topk", targets=["q_proj"])
    moa.build(model, "topk", targets=["v_proj"], modules_to_save=["lm_head"])
    assert model.modules_to_save == ["lm_head"] and model.base.lm_head.weight.requires_grad


def test_several_recipes_for_different_layers():
    recipes = [
        make_recipe("topk", n_experts=4, targets="attention"),
        make_recipe("remix", n_experts=6, rank=2, targets=("up_proj", "down_proj")),
    ]
    together = moa.build(models.llama(), recipes)
    step_by_step = moa.build(moa.build(models.llama(), recipes[0]), recipes[1])
    for model in (together, step_by_step):
        assert len(model.mixtures()) == 12
        assert [names[0].rsplit(".", 1)[-1] for _, names in model.recipes] == ["q_proj", "up_proj"]
        model.train()
        model(**models.lm_batch()).loss.backward()
        assert set(model.last_losses) == {"task", "policy", "balance", "z"}
        assert {b.bank.n_experts for _, b in model.branches()} == {4, 6}


def test_pefts_spellings_are_understood():
    model = moa.build(models.llama(), "topk", num_experts=3, top_k=1, r=2, lora_alpha=5, target_modules=["q_proj"],
                      lora_dropout=0.1)  # fmt: skip
    ((recipe, names),) = model.recipes
    assert (recipe.n_experts, recipe.k, recipe.rank, recipe.alpha, recipe.dropout) == (3, 1, 2, 5, 0.1)
    assert len(names) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": "top_k"}, "unknown router 'top_k'.*Did you mean 'topk'.*Known: .*remix"),
        ({"router": "nothing"}, "unknown router 'nothing'.*Known"),
        ({"n_expert": 4}, "unknown keyword 'n_expert' in the recipe 'topk'.*Did you mean 'n_experts'"),
        ({"samples": 4}, "unknown keyword 'samples' in the recipe 'topk'.*Known: .*balance"),
        ({"n_experts": 2, "k": 3}, "k=3 with n_experts=2"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"n_experts": 0}, "n_experts must be at least 1"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"expert": "lorra"}, "unknown expert family 'lorra'.*Did you mean 'lora'"),
        ({"rank": 4, "r": 8}, "rank is given twice"),
        ({"targets": ["q_porj"]}, "Near: q_proj"),
        ({"modules_to_save": ["clasifier"]}, "'clasifier', which LlamaForCausalLM does not have"),
        ({"router": 3}, "must be a name, a Recipe or a list"),
        ({"router": []}, "must be a name, a Recipe or a list"),
        ({"router": ["topk"]}, "must be a name, a Recipe or a list"),
        ({"router": make_recipe("topk"), "k": 1}, "belong inside the recipes"),
        ({"router": "remix", "samples": 1}, "at least 2"),
        ({"router": "sigmoid", "bias_rate": -1.0}, "bias_rate"),
        ({"engine": "fastest"}, "engine 'fastest'"),
        ({"experts": []}, "no adapter folder"),
        ({"experts": ["/nowhere"], "router": make_recipe("topk")}, "router as a name"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:40],
)
def test_bad_input_is_one_clear_error_and_changes_nothing(options, words):
    model = models.llama()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(moa.MoaError, match=re.compile(words, re.DOTALL)) as caught:
        moa.build(model, **options)
    assert len(str(caught.value)) > 25
    assert not any(isinstance(m, Mixture) for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_list_whose_second_recipe_fails_leaves_nothing_behind():
    model = models.llama()
    first = make_recipe("topk", targets="attention")
    with pytest.raises(ConfigError, match="already carry"):
        moa.build(model, [first, make_recipe("topk", targets=("q_proj",))])
    assert not any(isinstance(m, Mixture) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    built = moa.build(model, first)
    with pytest.raises(ConfigError):
        moa.build(built, [make_recipe("remix", targets="ffn"), first])
    assert len(built.mixtures()) == 8 and len(built.recipes) == 1 and built.samples == 1
    assert len(moa.build(built, "topk", targets="ffn").mixtures()) == 14


def test_already_built():
    model = moa.build(models.llama(), "topk")
    with pytest.raises(ConfigError, match="already carries experts: build on the MoAModel"):
        moa.build(model.base, "topk")
    with pytest.raises(ConfigError, match="14 layers already carry experts"):
        moa.build(model, "remix")
    again = moa.build(model.unload(), "remix")
    assert len(again.mixtures()) == 6


def test_print_and_counts(capsys):
    moa.build(models.llama(), "topk").print_trainable_parameters()
    assert re.match(
        r"trainable params: [\d,]+ \|\| all params: [\d,]+ \|\| trainable%: [\d.]+", capsys.readouterr().out
    )


def test_building_draws_the_same_numbers_from_the_same_seed():
    states = []
    for _ in range(2):
        torch.manual_seed(4)
        base = models.llama()
        torch.manual_seed(5)
        states.append(moa.build(base, "topk").adapter_state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_recipe_of_ones_own():
    from moa.recipes.gates import TopK

    try:
        register_recipe("mine", "nobody 2026")(type("Mine", (TopK,), {"__module__": __name__}))
        assert len(moa.build(models.llama(), "mine", targets=["q_proj"]).mixtures()) == 2
        with pytest.raises(ConfigError, match="'mine' is already"):
            register_recipe("mine")(type("Other", (TopK,), {}))
    finally:
        RECIPES.pop("mine", None)
    with pytest.raises(ConfigError, match="unknown router"):
        recipe_class("mine")


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_are_rows_of_plain_values(name):
    """What a checkpoint stores is the row: it must come back equal from JSON."""
    import json

    recipe = make_recipe(name)
    row = json.loads(json.dumps(recipe.to_dict()))
    assert row.pop("router") == name
    assert make_recipe(name, **row) == recipe
    assert RECIPES[name].paper and RECIPES[name].__doc__
    with pytest.raises(AttributeError):
        recipe.k = 3


def test_a_plain_module_with_a_config_of_its_own():
    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"width": 4}
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x)

    model = moa.build(Configured(), "topk")
    assert model.describe()["base"]["class"] == "Configured"


class Scorer(type(models.bert())):
    """A classifier under a name of its own."""


class Ranker(transformers.BertPreTrainedModel):
    """A body and a head of one's own."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.rank = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()


class Beside(nn.Module):
    """A body somewhere in a plain module, a head beside it and one beside what holds it."""

    def __init__(self, config):
        super().__init__()
        self.towers = nn.ModuleDict(
            {"text": transformers.BertModel(config), "project": nn.Linear(config.hidden_size, 3)}
        )
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, input_ids):
        return self.scale * self.towers["project"](self.towers["text"](input_ids).last_hidden_state[:, 0])


def test_a_new_head_beside_a_body_in_a_plain_module_is_trained():
    model = Beside(models.bert().config)
    with pytest.warns(UnadaptedWarning, match="Beside: scale stays frozen"):
        made = moa.build(model, "topk", n_experts=4, k=2)
    assert made.modules_to_save == ["towers.project"] and model.towers["project"].weight.requires_grad
    assert all("project" not in name for name in made.mixtures())
    assert not moa.build(models.plain(), "topk").modules_to_save  # no body: it is adapted as a whole


def small(kind, **options):
    wave = {"conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (4, 2), "num_feat_extract_layers": 2}
    wave |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "tdnn_dim": (8,) * 5}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = getattr(transformers, f"{kind}Config")
    return config(**sizes, **(wave if kind == "Wav2Vec2" else {}), **options)


def test_a_new_head_is_found_where_the_class_has_no_part_that_it_calls_its_body():
    """transformers has 25 such classes: Whisper's, T5's and CLIP's among them."""
    t5 = models.t5().config
    whisper = {"d_model": 16, "num_mel_bins": 8, "max_source_positions": 30, "encoder_layers": 1, "decoder_layers": 1}
    whisper |= {"encoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_attention_heads": 2, "vocab_size": 60}
    sound = transformers.WhisperConfig(**whisper, pad_token_id=0)
    towers = {"text_config": small("CLIPText", vocab_size=48).to_dict()}
    towers["vision_config"] = small("CLIPVision", image_size=8, patch_size=4).to_dict()
    for made, heads in (
        (transformers.T5ForQuestionAnswering(t5), ["qa_outputs"]),
        (transformers.WhisperForAudioClassification(sound), ["projector", "classifier"]),
        (transformers.CLIPForImageClassification(transformers.CLIPConfig(**towers)), ["classifier"]),
    ):
        model = moa.build(made, "topk", n_experts=2)
        assert model.modules_to_save == heads, type(made).__name__
        assert not any(name.startswith(tuple(heads)) for name in model.mixtures())


def test_a_base_with_a_part_that_is_called_as_one_of_ours_keeps_it():
    """The speaker model's loss is its `objective`, and what is new is trained."""
    model = moa.build(transformers.Wav2Vec2ForXVector(small("Wav2Vec2")), "topk", n_experts=2)
    assert "objective" in model.modules_to_save and isinstance(model.base.objective, nn.Module)
    assert not isinstance(model.objective, nn.Module)
    model.classifier = head = nn.Linear(8, 4)  # one that only the base has
    assert model.base.classifier is head


def test_one_name_is_not_a_list_of_letters(tmp_path):
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        get_peft_model(models.llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    listed = list(moa.build(models.llama(), "fixed", experts=[tmp_path]).mixtures())
    for one in (tmp_path, str(tmp_path)):
        assert list(moa.build(models.llama(), "fixed", experts=one).mixtures()) == listed
    named = moa.build(models.llama(), "fixed", experts=[tmp_path], expert_names="poet")
    assert named.recipes[0][0].names == ("poet",)


@pytest.mark.parametrize("word", ["targets", "exclude"])
def test_names_come_in_any_collection(word, tmp_path):
    names = ["v_proj", "q_proj"]
    listed = list(moa.build(models.llama(), "topk", **{word: names}).mixtures())
    for given in (iter(names), dict.fromkeys(names).keys(), set(names), (n for n in names)):
        model = moa.build(models.llama(), "topk", **{word: given})
        model.save_pretrained(tmp_path)
        assert list(model.mixtures()) == list(moa.load(tmp_path, base=models.llama()).mixtures()) == listed


def test_a_new_head_is_found_under_any_name():
    config = models.bert().config
    for made, head in ((Scorer(config), "classifier"), (Ranker(config), "rank")):
        model = moa.build(made, "topk", targets="attention")
        assert model.modules_to_save == [head] and all(p.requires_grad for p in getattr(made, head).parameters())
    for made in (transformers.BertForMaskedLM(config), models.llama(), models.t5()):
        assert moa.build(made, "topk", targets="attention").modules_to_save == []  # pretrained with the body
    assert moa.build(Ranker(config), "topk", targets="attention", modules_to_save=[]).modules_to_save == []
