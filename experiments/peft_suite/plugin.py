"""A pytest plugin: puts the facade in PEFT's place before the tests are read, and sorts what becomes of each case.

PEFT_SUITE_RECIPES names the recipes ("peft" leaves PEFT in its own place), PEFT_SUITE_OUT the file for the cases. Each
test runs once for every recipe, in one process: reading the tests takes longer than running most of them.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from moa.errors import MoaError

from .bases import no_network
from .facade import OF_THE_RECIPE, Standing, names_for_tests, unknown_options

# cases that look at PEFT's own bookkeeping, which a mixture has no counterpart of
OWN = {
    "test_adapter_name": "an adapter's name inside the names of its parameters",
    "test_from_pretrained_config_construction": "PEFT's configuration objects",
    "test_merge_layers_is_idempotent": "a warning of merge_adapter; moa folds inside a block",
    "test_disable_adapters_exiting_context_restores_previous_state": "a switch for each layer",
    "test_disable_adapters_exiting_context_irregular_state": "a switch for each layer",
    "test_adapter_dtype_autocast": "autocast_adapter_dtype",
    "TestRequiresGrad::test_requires_grad": "the names of LoRA's own parameters",
    "TestEncoderDecoderModels::test_generate_pos_args": "PEFT refuses positional inputs here; moa takes them",
    **dict.fromkeys(
        (
            *("test_set_requires_grad", "delete", "test_load_multiple_adapters", "mixed_adapter_batches"),
            *("MixedAdapterBatches", "test_weighted_combination_of_adapters", "test_merge_layers_multi"),
            *("MultipleActiveAdapters", "test_active_adapter", "selected_adapters", "adapter_name_substring"),
            *("test_adding_multiple_adapters_with_bias_raises", "add_weighted_adapter", "multiple_adapters"),
        ),
        "several named adapters",
    ),
    "pickle": ".bin files",
    "test_get_base_model_state_dict": "state-dict helpers",
    "test_lora_conversion": "conversion of other adapters to LoRA",
    "test_load_model_low_cpu_mem_usage": "a base on the meta device",
    "TestLayerRepr": "the text of LoRA's own layers",
    "TestDefaultTargetModules": "PEFT's table of default targets",
    "TestDynamicDispatch": "layers of the user's own in PEFT's table",
}
recipes: list[str] = []
cases: list[dict[str, str]] = []  # recipe, case, verdict, why


def pytest_configure(config: pytest.Config) -> None:
    """Stand in, before the tests import PEFT."""
    recipes[:] = os.environ["PEFT_SUITE_RECIPES"].split()
    try:
        importlib.import_module("diffusers")
    except ImportError:  # the tests of image models need it, and only the name is asked of it here
        stub = types.ModuleType("diffusers")
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = stub
    no_network()
    if recipes != ["peft"]:
        for module, names in names_for_tests().items():
            for name, value in names.items():
                setattr(importlib.import_module(module), name, value)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the cases of LoRA; count the others as not applicable without running them."""
    from peft import LoraConfig

    kept, left = [], []
    for item in items:
        given: Any = getattr(item, "callspec", None)
        kinds = [value for value in (given.params if given else {}).values() if isinstance(value, type)]
        why = next((why for name, why in OWN.items() if name in item.nodeid), None)
        if any(kind is not LoraConfig for kind in kinds if kind.__name__.endswith("Config")):
            why = "PEFT's other kinds of adapters"
        strange = unknown_options(given.params.get("config_kwargs") or {}) if given and why is None else []
        if strange and kinds == [LoraConfig]:
            why = f"LoRA's option {strange[0]}"
        if why is None:
            kept.append(item)
        else:
            left.append(item)
            note(item, "not applicable", why, recipes)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def note(item: pytest.Item, verdict: str, why: str, of: list[str]) -> None:
    """Write down what became of a case under some recipes."""
    cases.extend({"recipe": recipe, "case": item.nodeid, "verdict": verdict, "why": why} for recipe in of)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Run a test for each recipe in turn, or once where it applies to none."""
    for place, Standing.recipe in enumerate(recipes):
        item._initrequest()  # type: ignore[attr-defined]
        runtestprotocol(item, nextitem=nextitem)
        last = cases[-1]
        if last["verdict"] == "not applicable" and not last["why"].startswith(OF_THE_RECIPE):
            note(item, "not applicable", last["why"], recipes[place + 1 :])
            return True
    return True


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Sort a case once it has run."""
    if call.when == "setup":
        Standing.models = 0
    outcome: Any = yield
    report = outcome.get_result()
    if call.when != "call" and report.outcome == "passed":
        return
    error = call.excinfo.value if call.excinfo else None
    first = str(error).strip().partition("\n")[0][:200] if error is not None else ""
    if report.skipped:
        verdict = "not applicable"
        why = first.partition("absent: ")[2] or "PEFT skips it, or expects it to fail"
    elif report.passed:
        verdict, why = "passed", ""
        if not Standing.models and recipes != ["peft"]:
            verdict, why = "not applicable", "it builds no model"
    elif isinstance(error, MoaError):
        verdict, why = "refused", f"{type(error).__name__}: {first}"
    else:
        verdict, why = "failed", f"{type(error).__name__}: {first}"
    note(item, verdict, why, [Standing.recipe])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the cases down."""
    Path(os.environ["PEFT_SUITE_OUT"]).write_text(json.dumps(cases, indent=1))
