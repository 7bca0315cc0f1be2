"""Router, bank and recipe from outside the package, as a plug-in. Run: pytest tests/systems/test_plugin.py"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import moa
from moa.errors import ConfigError
from tests import laws, models

PLUGIN = '''
"""Bias experts behind a router that looks at the norm of a row: a recipe of one's own."""

from dataclasses import dataclass

import torch
from torch import nn

from moa import Branch, ExpertBank, Recipe, Router, Routing


class NormRouter(Router):
    """w = softmax(a |x| + b)."""

    def __init__(self, d_in, n_experts):
        super().__init__(d_in, n_experts, n_experts)
        self.a, self.b = nn.Parameter(torch.randn(n_experts)), nn.Parameter(torch.zeros(n_experts))

    def forward(self, x, context):
        logits = x.norm(dim=-1, keepdim=True).float() * self.a + self.b
        return Routing(logits.softmax(-1), None, self.n_experts, logits, logits.softmax(-1))


class ScaleBank(ExpertBank):
    """E_e(x) = v_e · (x W), W frozen: (IA)3 on a random projection."""

    per_expert = ("v",)

    def __init__(self, d_in, d_out, n_experts, **options):
        super().__init__(d_in, d_out, n_experts, **options)
        self.v = nn.Parameter(torch.zeros(n_experts, d_out))
        self.register_buffer("w", torch.randn(d_in, d_out) / d_in**0.5)

    def reset_parameters(self):
        nn.init.zeros_(self.v)

    def expert_forward(self, x, expert):
        return self.v[expert].to(x.dtype) * (x @ self.w.to(x.dtype))


@dataclass(frozen=True, kw_only=True)
class NormScale(Recipe):
    """The two together."""

    def build(self, site):
        return [Branch(NormRouter(site.d_in, self.n_experts), ScaleBank(site.d_in, site.d_out, self.n_experts))]
'''

CHECK = """
import sys
import torch
import moa
from moa.recipes import RECIPES, recipe_class
from tests import laws, models
from tests.experts import bank_laws
from tests.routers import router_laws

recipe_class("norm_scale")
assert "norm_scale" in RECIPES and RECIPES["norm_scale"].__module__ == "norm_scale_plugin"
import norm_scale_plugin as plugin

router = laws.randomised(plugin.NormRouter(5, 4).double())
x, context = torch.randn(3, 7, 5).double(), laws.make_context((3, 7))
router_laws.router_routing_is_valid(router, x, context, normalised=True)
router_laws.router_parameters_are_reached(router, x, context)
router_laws.router_is_deterministic_in_eval(router, x, context)
router_laws.router_is_batch_invariant(router, x, torch.ones(3, 7, dtype=torch.bool))
router_laws.router_is_causal(router, x, 3)
bank = laws.randomised(plugin.ScaleBank(5, 6, 4).double())
bank_laws.bank_selects(bank, x)
bank_laws.bank_is_linear(bank, x)
bank_laws.bank_broadcasts(bank, x, 2)
bank_laws.bank_relabels(bank, x, 2)
bank_laws.bank_is_local(bank, x, 2)
bank_laws.bank_fast_is_generic(bank, x, 2, False)

model = models.randomise(moa.build(models.llama(), router="norm_scale", n_experts=4))
batch = models.lm_batch()
loss = model.train()(**batch).loss
loss.backward()
assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
model.eval().generate(batch["input_ids"].clamp(min=2), max_new_tokens=2)
model.save_pretrained(sys.argv[1])
again = moa.load(sys.argv[1], base=models.llama())
assert again.recipes[0][0] == model.recipes[0][0]
try:
    moa.make_recipe("norm_scale", n_expert=3)
except moa.MoaError as error:
    assert "Did you mean 'n_experts'" in str(error)
try:
    moa.make_recipe("norm_scal")
except moa.MoaError as error:
    assert "Did you mean 'norm_scale'" in str(error)
else:
    raise AssertionError
print("fine")
"""


def test_an_installed_plug_in_is_found_by_name(tmp_path: Path) -> None:
    """Installed as pip would lay it out: the module and its entry point, in a folder on the path."""
    site = tmp_path / "site"
    info = site / "norm_scale_plugin-0.1.dist-info"
    info.mkdir(parents=True)
    (site / "norm_scale_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: norm-scale-plugin\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[moa.recipes]\nnorm_scale = norm_scale_plugin:NormScale\n")
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHECK), str(tmp_path / "saved")],
        cwd=root,
        env={"PYTHONPATH": f"{site}:{root}", "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0 and run.stdout.strip().endswith("fine"), run.stderr[-2000:]


def test_the_decorator_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moa.recipes.recipe, "RECIPES", dict(moa.RECIPES))
    table = moa.recipes.recipe.RECIPES
    original = table["topk"]
    made = moa.register_recipe("mine", "a paper")(type("Mine", (original,), {}))
    assert table["mine"] is made and made.paper == "a paper"
    with pytest.raises(ConfigError, match=r"recipe 'mine' is already .*Mine"):
        moa.register_recipe("mine")(type("Other", (original,), {}))
    model = moa.build(models.llama(), made(n_experts=4))
    laws.assert_close(
        models.outputs_of(model, models.lm_batch()), models.outputs_of(models.llama(), models.lm_batch()), 1e-5
    )
