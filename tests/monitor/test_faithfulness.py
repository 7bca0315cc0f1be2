"""The probes of faithfulness on models whose use of their reasoning is known, and against transformers by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

import moa
from moa.errors import ConfigError
from moa.monitor.faithfulness import faithfulness
from moa.monitor.rewording import SIGNS, WORDS, reworded
from tests import models

DIGITS = [str(n) for n in range(10)]
NAMES = ["nil", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TOKENS = ["<pad>", "</s>", "\n", "Answer:", "...", "add", "and", "so", "hence", "it", "is", *DIGITS, *NAMES]
FIRST_NUMBER, NEWLINE, CUE = TOKENS.index("0"), 2, 3


class Reader(PreTrainedModel, GenerationMixin):
    """Attends to one number of those before the cue, the first or the last, and writes it; then the line ends.

    The first one is the question's: such a model ignores its reasoning. The last one is the reasoning's.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"

    def __init__(self, last: bool) -> None:
        super().__init__(PreTrainedConfig(vocab_size=len(TOKENS), eos_token_id=1, pad_token_id=0))
        self.last = last
        self.sharpness = nn.Parameter(torch.tensor(9.0))
        self.generation_config.use_cache = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """Return logits (B, S, V) of tokens (B, S)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        place = torch.arange(input_ids.shape[1])
        is_number = (input_ids >= FIRST_NUMBER) & mask.bool()  # (B, S)
        rank = (place if self.last else -place).double().masked_fill(~is_number, -1e9)  # (B, S)
        seen = (place <= place[:, None]).unsqueeze(0)  # (1, S, S)
        chosen = rank[:, None].masked_fill(~seen, -2e9).argmax(-1)  # (B, S)
        number = input_ids.gather(1, chosen)
        following = torch.where(input_ids == CUE, number, torch.full_like(number, NEWLINE))
        return CausalLMOutput(logits=self.sharpness * nn.functional.one_hot(following, len(TOKENS)).float())

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """Return whole rows (B, S) at each step: nothing is cached."""
        return {"input_ids": input_ids, "attention_mask": kwargs["attention_mask"]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    table = Tokenizer(WordLevel({token: n for n, token in enumerate(TOKENS)}, unk_token="<pad>"))
    table.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n"), "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    table.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=table, pad_token="<pad>", eos_token="</s>")


PROMPTS = ["add 1 and 2\n", "add 3 and it and 4\n", "add 2 and 5\n"]
REASONINGS = ["it is 1 and 2 so it is 3", "3 and 4 so 7", "so it is 7"]
LAST = ["3", "7", "7"]
FIRST = ["1", "3", "2"]


def named(text: str) -> str:
    """Return a text with its digits as names: another wording of the same."""
    return " ".join(NAMES[int(word)] if word in DIGITS else word for word in text.split(" "))


@pytest.mark.parametrize("choices", [None, [[*DIGITS, *NAMES]] * 3])
def test_who_ignores_the_reasoning_scores_0_and_who_copies_from_it_1(tokenizer: Any, choices: Any) -> None:
    options: dict[str, Any] = {"choices": choices, "reasonings": REASONINGS, "paraphrase": named, "batch_size": 2}
    blind = faithfulness(Reader(last=False), tokenizer, PROMPTS, **options)
    assert blind.answers == FIRST
    effects = [*blind.early_end.values(), blind.paraphrase, blind.filler]
    assert [effect.changed for effect in effects] == [0.0] * 6
    assert [effect.log_probability for effect in effects] == pytest.approx([0.0] * 6, abs=1e-6)

    copying = faithfulness(Reader(last=True), tokenizer, PROMPTS, **options)
    assert copying.answers == LAST
    assert copying.reworded == 1 and list(copying.early_end) == [0.0, 0.25, 0.5, 0.75]
    for effect in (*copying.early_end.values(), copying.paraphrase, copying.filler):
        assert effect.changed == 1
        assert effect.log_probability == pytest.approx(-9, abs=1e-3)  # from the chosen token's logit to another's


def test_the_curve_falls_where_the_answer_stands_early(tokenizer: Any) -> None:
    early = ["is 6 it is it is it is", "it is it is 7 it is it", "it is it is it is it 3"]  # 8 tokens each
    options: dict[str, Any] = {"reasonings": early, "fractions": (0.0, 0.25, 0.625, 0.875)}
    found = faithfulness(Reader(last=True), tokenizer, PROMPTS, **options)
    assert [effect.changed for effect in found.early_end.values()] == pytest.approx([1, 2 / 3, 1 / 3, 1 / 3])
    assert found.filler.changed == 1
    # the paraphrase by rule leaves numbers as they are: who copies them is not moved by it
    assert found.paraphrase.changed == 0 and found.reworded == 0


def real(tokenizer: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = models.llama()
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.eval()


def log_p(model: Any, tokenizer: Any, before: str, after: list[int]) -> tuple[float, bool]:
    """Return log p of tokens after a text, one at a time, and whether each is the likeliest."""
    ids, total, likeliest = tokenizer(before, add_special_tokens=False)["input_ids"], 0.0, True
    for token in after:
        scores = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        total, likeliest = total + scores[token].item(), likeliest and int(scores.argmax()) == token
        ids = [*ids, token]
    return total, likeliest


@torch.no_grad()
def test_what_a_model_writes_and_how_likely_it_is_are_those_of_transformers(tokenizer: Any) -> None:
    model = real(tokenizer)
    found = faithfulness(
        model, tokenizer, PROMPTS, max_reasoning=6, max_answer=3, fractions=(0.5,), paraphrase=named, batch_size=2
    )
    moved: dict[str, list[float]] = {"early": [], "named": [], "filler": []}
    changed = {name: 0 for name in moved}
    for prompt, reasoning, answer in zip(PROMPTS, found.reasonings, found.answers, strict=True):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        own = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert tokenizer.decode(own, skip_special_tokens=True).partition("Answer:")[0].rstrip() == reasoning
        parts = tokenizer(reasoning, add_special_tokens=False)["input_ids"]
        whole = [*ids[0].tolist(), *parts, NEWLINE, CUE]
        written = model.generate(torch.tensor([whole]), max_new_tokens=3, do_sample=False, pad_token_id=0)
        tokens = written[0, len(whole) :].tolist()
        if 1 in tokens:
            tokens = tokens[: tokens.index(1) + 1]
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == answer
        words = tokenizer.convert_ids_to_tokens(parts)
        others = {
            "early": " ".join(words[: round(len(words) / 2)]),
            "named": named(reasoning),
            "filler": " ".join(["..."] * len(words)),
        }
        before = log_p(model, tokenizer, f"{prompt}{reasoning}\nAnswer:", tokens)[0]
        for name, other in others.items():
            after, same = log_p(model, tokenizer, f"{prompt}{other}\nAnswer:", tokens)
            moved[name].append(after - before)
            changed[name] += not same
    effects = {"early": found.early_end[0.5], "named": found.paraphrase, "filler": found.filler}
    for name, effect in effects.items():
        assert effect.log_probability == pytest.approx(sum(moved[name]) / 3, abs=1e-5), name
        assert effect.changed == pytest.approx(changed[name] / 3), name
    assert any(effect.log_probability != 0 for effect in effects.values())


def test_a_mixture_is_asked_as_it_is_and_without_its_experts_as_its_base(tokenizer: Any) -> None:
    options: dict[str, Any] = {"max_reasoning": 5, "max_answer": 2, "fractions": (0.5,)}
    base = faithfulness(real(tokenizer), tokenizer, PROMPTS, **options)
    model = models.randomise(moa.build(real(tokenizer), "topk", n_experts=2, k=1, rank=2)).train()
    tuned = faithfulness(model, tokenizer, PROMPTS, **options)
    assert model.training and tuned != base
    with model.disable_adapter():
        assert faithfulness(model, tokenizer, PROMPTS, **options) == base


def test_a_reasoning_ends_where_the_model_writes_the_cue(tokenizer: Any) -> None:
    class Hasty(Reader):
        """Writes a cue as soon as a line ends."""

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> CausalLMOutput:
            found = super().forward(input_ids, attention_mask, **options)
            assert found.logits is not None
            found.logits[input_ids == NEWLINE] = 0
            found.logits[..., CUE] += 9.0 * (input_ids == NEWLINE)
            return found

    assert faithfulness(Hasty(last=True), tokenizer, PROMPTS).reasonings == ["", "", ""]


def test_another_wording_says_the_same_in_other_words() -> None:
    assert reworded("So we get 3 + 4 = 7, then -1.") == "Hence this gives 3 plus 4 is 7, afterwards -1."
    assert reworded("Also, because so-and-so") == "Moreover, as hence-and-hence"
    assert reworded("a 1/2 b-c, sofa") == "a 1/2 b-c, sofa"
    others = [*WORDS.values(), *SIGNS.values()]
    assert [reworded(text) for text in others] == others  # nothing is turned back


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": ["", "a", "b"]}, "a prompt has not one token"),
        ({"reasonings": ["it"]}, "reasonings are one for each prompt, got 1 for 3 prompts"),
        ({"choices": [["1", "2"]] * 2}, "choices are one for each prompt, got 2"),
        ({"choices": [["1", "2"], ["1", "2"], ["1", "1"]]}, "example 2 needs two different choices"),
        ({"choices": [["1", ""]] * 3}, "example 0 needs two different choices"),
        ({"fractions": (0.5, 1.0)}, r"fractions=1.0 must be from 0 to below 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"filler": ""}, "filler='' has not one token"),
    ],
)
def test_what_does_not_fit_is_named(tokenizer: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        faithfulness(Reader(last=True), tokenizer, **{"prompts": PROMPTS, "reasonings": REASONINGS, **options})


def test_a_model_that_does_not_write_is_named_and_still_chooses(tokenizer: Any) -> None:
    class Mute(nn.Module):
        """Says how likely tokens are, and no more."""

        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.reader = Reader(last=True)

        def forward(self, **inputs: Tensor) -> CausalLMOutput:
            """Return logits (B, S, V)."""
            out: CausalLMOutput = self.reader(**inputs)
            return out

    with pytest.raises(ConfigError, match="a Mute does not generate text"):
        faithfulness(Mute(), tokenizer, PROMPTS, reasonings=REASONINGS)
    choices = [DIGITS] * 3
    assert faithfulness(Mute(), tokenizer, PROMPTS, reasonings=REASONINGS, choices=choices).answers == LAST
