"""What files declare of recipes is what they are, and needs no torch. Run: pytest tests/runs/test_written_rows.py"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import typing
from typing import Any

import pytest

from moa.errors import ConfigError
from moa.experts import FAMILIES
from moa.recipes import RECIPES
from moa.runs.config import TrainConfig
from moa.runs.written_rows import written_rows
from moa.tables import COMMON

DECLARED = ("name", "places", "unused", "refused", "coefficients", "families", "uses", "wants_experts")
WRONG: dict[str, dict[str, Any]] = {
    "a router": {"router": "tpok"},
    "a router that is no name": {"router": 3},
    "a keyword": {"rnak": 4},
    "a keyword of another recipe": {"router": "dense", "capacity": 1.0},
    "a keyword of peft": {"use_rslora": True},
    "a keyword that contradicts": {"router": "xcross", "k": 2},
    "a family": {"expert": "lroa"},
    "a family of several": {"expert": ["lora", "sihra"]},
    "a family that is counted": {"expert": {"lora": 2, "sihra": 2}},
    "a keyword of a family": {"expert": "shira", "densty": 0.1},
    "a keyword in a list": {"expert": [{"family": "lora", "satrt": "zero"}]},
    "a family that does not fit": {"router": "hydra", "expert": "shira"},
    "a place": {"place": "nowhere"},
    "a place of others": {"router": "mixlora", "place": "block"},
    "a keyword without use": {"expert": "oft", "rank": 4},
    "text for a number": {"rank": "x"},
    "a number for text": {"targets": 3},
    "a truth value for a number": {"n_experts": True},
    "a choice": {"start": "zro"},
    "a choice of a recipe": {"losses_over": "x"},
    "no experts": {"n_experts": 0},
    "more than there are": {"n_experts": 2, "k": 3},
    "none of them": {"k": 0},
    "a rank": {"rank": 0},
    "a rank in a list": {"rank": [4, -1]},
    "a strength": {"alpha": -1.0},
    "a dropout": {"dropout": 1.5},
    "a coefficient": {"router": "loramoe", "localized": -0.1},
    "names of experts": {"n_experts": 2, "expert_names": ["a", "a"]},
    "a number above all": {"n_experts": 2**63},
}
# names of modules are refused at their import: the check must not even ask for them
SCRIPT = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in ("torch", "transformers"), name
sys.meta_path.insert(0, Refuse())
from moa.errors import ConfigError
from moa.runs.recipe_keywords import check_written
said = []
for recipe in json.load(sys.stdin):
    try:
        said.append(check_written(recipe))
    except ConfigError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def said_without_torch(recipes: list[dict[str, Any]]) -> list[str | None]:
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=json.dumps(recipes), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return typing.cast(list[str | None], json.loads(done.stdout))


def made(recipe: dict[str, Any]) -> None:
    TrainConfig(base="b", tasks={}, output="o", recipe=recipe).check_recipe()


@pytest.mark.parametrize(("decorator", "table"), [("register_recipe", RECIPES), ("register_expert", FAMILIES)])
def test_what_is_written_is_what_is_registered(decorator: str, table: dict[str, type]) -> None:
    written = written_rows(decorator)
    own = {name: row for name, row in table.items() if row.__module__.startswith("moa.")}
    assert sorted(written) == sorted(own) and len(own) > 15
    for name, row in own.items():
        there: Any = written[name]
        fields = {field.name: field.default for field in dataclasses.fields(there)}
        assert fields == {field.name: field.default for field in dataclasses.fields(row)}, name  # type: ignore[arg-type]
        hints, right = typing.get_type_hints(there), typing.get_type_hints(row)
        assert not [key for key in fields if key != "expert" and hints[key] != right[key]], name
        for attribute in DECLARED:
            assert getattr(there, attribute, None) == getattr(row, attribute, None), (name, attribute)


def test_wrong_recipes_are_refused_without_torch_in_the_same_words() -> None:
    for (name, recipe), said in zip(WRONG.items(), said_without_torch(list(WRONG.values())), strict=True):
        with pytest.raises(ConfigError) as error:
            made(recipe)
        assert said == str(error.value), name


@pytest.mark.filterwarnings("ignore::moa.errors.UnusedKeywordWarning")
def test_right_recipes_pass() -> None:
    """Every recipe as it stores itself, and every family under topk, is refused neither before nor after."""
    right: list[dict[str, Any]] = [{"router": name} for name, row in RECIPES.items() if not row.wants_experts]
    right += [{"expert": name, **FAMILIES[name]().keywords()} for name in written_rows("register_expert")]
    right += [
        {"router": name, **{f.name: f.default for f in dataclasses.fields(row) if f.name not in ("expert", *COMMON)}}
        for name, row in written_rows("register_recipe").items()
    ]
    right += [
        {"router": "dense", "k": 2},
        {"rank": [4, 8]},
        {"expert": ["lora", {"family": "shira", "density": 0.1}]},
        {"expert": {"lora": 2, "shira": 2}, "density": 0.1},
        {"router": "flylora", "rank": 32},
    ]
    for recipe in right:
        made(recipe)
    assert said_without_torch(right) == [None] * len(right)
