"""A training configuration: YAML or plain values in, frozen dataclasses out, every key checked."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from ..tables import own_words
from ..training.strategies import check_strategy
from ..training.strategy import Strategy
from .arguments import check_training
from .recipe_keywords import typed_keywords
from .tasks import Task
from .yaml_values import is_file, one_line, read_dataclass, read_values, set_override, typed

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp64": "float64"}


@dataclass(frozen=True, kw_only=True)
class Compare:
    """What the mixture is measured against, with the same rows and the same evaluation.

    Args:
        frozen: the frozen base. Classification: logistic regression per task on its pooled features. Generation: the
            base as it is.
        lora: one LoRA on the same layers with as many parameters as are active in the mixture.
        learning_rates: the LoRA's are picked from these on held-out training rows; empty takes a third of, once and
            three times the run's own.
        l2: strengths of the regression's penalty, picked in the same way.
        validation_fraction: share of the training rows held out for picking; the final training uses all rows.
        search_epochs: epochs of each LoRA run that only serves to pick; None takes the run's own number.
    """

    frozen: bool = True
    lora: bool = True
    learning_rates: Sequence[float] = ()
    l2: Sequence[float] = (0.001, 0.01, 0.1)
    validation_fraction: float = 0.2
    search_epochs: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"compare.validation_fraction must lie between 0 and 1, got {self.validation_fraction}.")
        if not self.l2:
            raise ConfigError("compare.l2 is empty: name at least one strength.")
        for name in ("learning_rates", "l2"):
            wrong = [value for value in getattr(self, name) if value <= 0]
            if wrong:
                raise ConfigError(f"compare.{name} must hold positive numbers, got {wrong[0]}.")
        if self.search_epochs is not None and self.search_epochs <= 0:
            raise ConfigError(f"compare.search_epochs must be positive, got {self.search_epochs}.")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Answers to write at the end of a generation run.

    Args:
        rows: evaluation prompts per task, at most 16.
        max_new_tokens: tokens per answer at most.
    """

    rows: int = 2
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        for name in ("rows", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"generate.{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that makes a run.

    Args:
        base: hub id or folder of the pretrained model.
        tasks: name -> task (see `moa.runs.tasks.Task`); their order gives the task ids. `~` and `$NAME` in paths are
            expanded.
        output: folder of the run.
        overwrite: replace a run that is already there, once the new one is trained.
        recipe: router, and that recipe's keywords (`moa recipes` lists them), peft's spellings included; or experts,
            folders of PEFT LoRA adapters, in place of n_experts.
        training: keywords of `transformers.TrainingArguments`, except output_dir and seed. With eval_strategy the
            evaluation rows of all tasks are evaluated while training.
        strategy: name, and the keywords of that way to train the mixture (docs/strategies.md); null is Trainer's own.
        seed: of everything that is drawn, from 0 to 2**32 - 1.
        max_length: tokens per row at most.
        long_rows: what becomes of longer rows: "truncate" (a text or chat loses its end, a prompt its beginning),
            "skip" or "refuse"; how many is said.
        packing: several training rows of text to write in one sequence of at most max_length tokens, none of which sees
            another; for recipes that route each token by itself. Batches are then of so many sequences.
        pooling: of classification: "mean", "cls" or "last".
        dtype: of the frozen base, e.g. "bfloat16"; None is as stored. Experts, routers and heads are float32.
        patience: stop after so many evaluations without a lower loss, and keep the best model; evaluates every epoch
            unless training.eval_strategy says otherwise.
        imports: written `import:`; modules or .py files that register your own routers, recipes or families.
        score_before: score the evaluation rows before training too; training.disable_tqdm: true leaves out the bars.
        compare: baselines; null for none.
        generate: answers at the end of a generation run; null for none.

    Raises:
        ConfigError: a value out of range.
    """

    base: str
    tasks: Mapping[str, Task]
    output: str
    overwrite: bool = False
    recipe: Mapping[str, Any] = field(default_factory=lambda: {"router": "topk"})
    training: Mapping[str, Any] = field(default_factory=dict)
    strategy: Mapping[str, Any] | None = None
    seed: int = 0
    max_length: int = 128
    long_rows: Literal["truncate", "skip", "refuse"] = "truncate"
    packing: bool = False
    pooling: Literal["mean", "cls", "last"] = "mean"
    dtype: str | None = None
    patience: int | None = None
    imports: Sequence[str] = ()
    score_before: bool = True
    compare: Compare | None = None
    generate: Generate | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError(f"max_length must be at least 2 tokens, got {self.max_length}.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be from 0 to 2**32 - 1, got {self.seed}.")
        if self.dtype is not None and self.dtype not in DTYPES:
            near = SHORT_DTYPES.get(self.dtype)
            hint = f" Did you mean {near!r}?" if near else ""
            raise ConfigError(f"unknown dtype {self.dtype!r}.{hint} Known: {', '.join(DTYPES)}.")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"patience must be at least 1 evaluation, got {self.patience}.")
        if not self.base or not self.output:
            raise ConfigError(f"{'output' if self.base else 'base'} is empty: name a folder.")
        check_training(self.training)
        self.made_strategy()

    def made_strategy(self) -> Strategy | None:
        """Return the strategy that is asked for, None for Trainer's own way.

        Raises:
            ConfigError: a name or keyword that does not exist, or training arguments that contradict it.
        """
        return None if self.strategy is None else check_strategy(self.strategy, self.training)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values from which `parse` makes an equal configuration."""
        values = typing.cast(dict[str, Any], _plain(dataclasses.asdict(self)))
        values["import"] = values.pop("imports")
        return values

    def check_recipe(self) -> None:
        """Check the recipe's name, keywords and their types, by making one; imports torch, and what `import:` names.

        Raises:
            ConfigError: a module that cannot be imported, or a recipe that does not exist or does not take this.
        """
        for name in self.imports:
            import_module(name)
        from ..experts.mixed import families_of
        from ..recipes import make_recipe, recipe_class

        options = {"router": "topk", **self.recipe}
        options.pop("experts", None)
        router = typed(options["router"], str, "recipe: router")
        recipe = recipe_class(router)
        usual = next(f.default for f in dataclasses.fields(recipe) if f.name == "expert")
        families = families_of(options.get("expert", usual))
        make_recipe(**typed_keywords(recipe, families, options))


def read_config(path: str | Path, overrides: Sequence[str] = (), *, recipe: bool = True) -> TrainConfig:
    """Return the configuration in a YAML file.

    Args:
        path: of the file.
        overrides: "a.b=c" each, c in YAML.
        recipe: check the recipe too, which imports torch.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (the nearest known one is named), a value of another type.
    """
    values = read_values(path)
    for override in overrides:
        set_override(values, override)
    return parse(values, str(path), recipe=recipe)


def parse(values: Mapping[str, Any], where: str = "the configuration", *, recipe: bool = True) -> TrainConfig:
    """Return the configuration that plain values describe, paths expanded.

    Raises:
        ConfigError: as `read_config`.
    """
    values = dict(values)
    if "import" in values:
        given = values.pop("import")
        names = [given] if isinstance(given, str) else [] if given is None else given
        values["imports"] = typed(names, Sequence[str], f"{where}: import")
    if isinstance(values.get("recipe"), Mapping):
        values["recipe"] = own_words(values["recipe"], "recipe: ")
    config: TrainConfig = read_dataclass(TrainConfig, values, where)
    tasks = {
        name: dataclasses.replace(task, train=_expand(task.train), eval=task.eval and _expand(task.eval))
        for name, task in config.tasks.items()
    }
    config = dataclasses.replace(
        config, base=_expand(config.base), tasks=tasks, imports=tuple(map(_expand, config.imports))
    )
    if recipe:
        config.check_recipe()
    return config


def import_module(name: str) -> None:
    """Import a module by its dotted name, or a .py file by its path, once.

    Raises:
        ConfigError: there is none, or it fails.
    """
    try:
        if not name.endswith(".py"):
            if not sys.path or sys.path[0] not in ("", os.getcwd()):
                sys.path.insert(0, os.getcwd())  # as `python -m` would; a console script does not
            importlib.import_module(name)
            return
        if not is_file(name):
            raise ConfigError(f"import: there is no file {name} (looked from {Path.cwd()}).")
        stem = Path(name).stem
        if getattr(sys.modules.get(stem), "__file__", None) == str(Path(name).resolve()):
            return
        spec = importlib.util.spec_from_file_location(stem, Path(name).resolve())
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[stem] = module
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"import: {name} cannot be imported: {one_line(error)}.") from error


def _expand(source: Any) -> Any:
    """Return a path or several with ~ and $NAME expanded, absolute where they exist; hub ids stay as they are."""
    if not isinstance(source, str):
        return tuple(_expand(one) for one in source)
    text = os.path.expandvars(os.path.expanduser(source))
    return str(Path(text).resolve()) if os.path.exists(text) else text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
