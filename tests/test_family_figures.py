"""The harness of the families' figures on a tiny model: what it counts, what survives. Run: pytest tests"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from experiments import family_figures, family_models
from experiments.family_models import LLAMA_LINEARS, N_EXPERTS, Loop, Shape

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft asks by the old name
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]
WIDTH, INNER = 32, 64


def tiny(folder: str | None = None, blocks: int = 1) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": blocks, "num_attention_heads": 2}
    return LlamaModel(LlamaConfig(vocab_size=600, pad_token_id=0, num_key_value_heads=2, **sizes))


SHAPE = Shape(tiny, LLAMA_LINEARS, ("down_proj",), 4, 5, decodes=True)
SIZES = [(WIDTH, WIDTH)] * 4 + [(WIDTH, INNER)] * 2 + [(INNER, WIDTH)]


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_what_is_counted(name: str) -> None:
    """Numbers by the papers' formulas and peft's count; nothing here is a time."""
    found = family_figures.one_expert(SHAPE, name, tiny, rounds=1, tokens=1)
    formula = {"lora": sum(8 * (i + o) for i, o in SIZES), "ia3": 4 * WIDTH + 3 * INNER}
    assert found["parameters"] == found["peft_parameters"] == formula[name]
    assert 4 * found["parameters"] < found["checkpoint_bytes"] < 4 * found["parameters"] + 20_000
    assert found["saved_over_x"] > 0 and found["no_decoding"] is None
    assert all(math.isfinite(found[key]) for key in ("step_over_base", "decode_over_base", "peft_step_over_moa"))


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_the_loop_over_pefts_layers_is_their_mixture(name: str) -> None:
    """Each adapter's layer on all rows, weighted; and all adapters are trained."""
    model = family_models.peft_loop(tiny(), name, SHAPE)
    loops = [m for m in model.modules() if isinstance(m, Loop)]
    x = torch.randn(4, 5, loops[0].gate.in_features)
    with torch.no_grad():
        for parameter in loops[0].layer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        all_of_them = torch.stack([loops[0].adapted(x, e) for e in range(N_EXPERTS)], -2)  # (B, S, E, o)
        if name == "dora":
            weights = torch.full((4, 5, N_EXPERTS), 1 / N_EXPERTS)
        else:
            kept, indices = loops[0].gate(x).topk(2, -1)
            weights = torch.zeros(4, 5, N_EXPERTS).scatter(-1, indices, kept.softmax(-1))
        expected = (all_of_them * weights[..., None]).sum(-2)
        assert torch.allclose(loops[0](x), expected, atol=1e-5) and not torch.allclose(expected, all_of_them[..., 0, :])
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "lora_" in n)
    assert trained == N_EXPERTS * sum(8 * (i + o) + (o if name == "dora" else 0) for i, o in SIZES)


def test_one_that_fails_leaves_its_reason_and_the_others_go_on(tmp_path: Path, monkeypatch: Any) -> None:
    """One raises, one is killed in the middle, one is right; the next run measures only what is not."""
    settings = {"blocks": 1}
    ran = tmp_path / "ran.txt"

    def measure(kind: str, name: str, settings: Any) -> Iterator[dict[str, Any]]:
        with ran.open("a") as file:
            file.write(name + "\n")
        yield {"forward_64_over_4": 1.0}
        if name == "wrong":
            raise ValueError("sizes do not fit")
        if name == "killed":
            os.kill(os.getpid(), 9)
        row = dict.fromkeys(("step_over_base", "saved_over_x", "decode_over_base", "seconds", "parameters"), 1)
        yield {"forward_64_over_4": 1.0, "peft_step_over_moa": None, "loop_step_over_moa": None, **row}

    monkeypatch.setattr(family_figures, "measure", measure)
    names = ["wrong", "killed", "right"]
    for _ in range(2):
        family_figures.run(tmp_path, ["SmolLM2"], names, settings, 1, time.monotonic() + 60)
    rows = {name: family_figures.read(tmp_path, "SmolLM2", name, settings) for name in names}
    assert rows["wrong"]["error"] == "ValueError: sizes do not fit" and rows["wrong"]["forward_64_over_4"] == 1.0
    assert rows["killed"]["error"] == "it took too long" and "error" not in rows["right"]
    assert ran.read_text().split() == ["wrong", "killed", "right", "wrong", "killed"]
    other = family_figures.read(tmp_path, "SmolLM2", "right", {"blocks": 2})
    assert other == {"error": family_figures.UNMEASURED}, "figures of other settings"
    family_figures.run(tmp_path, ["SmolLM2"], ["late"], settings, 1, time.monotonic() - 1)
    assert not (tmp_path / "SmolLM2-late.json").exists()
    assert json.loads((tmp_path / "SmolLM2-right.json").read_text())["settings"] == settings
