"""The examples in the docstrings run, and every public name has one."""

import doctest
import inspect
import pkgutil
from importlib import import_module

import pytest

import metalr_hf
from metalr_hf.rules import RULES
from metalr_hf.strategies import STRATEGIES

ROOMS = [module.name for module in pkgutil.iter_modules(metalr_hf.__path__)]


@pytest.mark.parametrize("room", ROOMS)
def test_examples_run(room, monkeypatch, tmp_path):
    # What an example registers or writes is gone after it.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("metalr_hf.rules.RULES", {**RULES})
    monkeypatch.setattr("metalr_hf.strategies.STRATEGIES", {**STRATEGIES})
    failures, _ = doctest.testmod(import_module(f"metalr_hf.{room}"), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failures == 0


@pytest.mark.parametrize("name", metalr_hf.__all__)
def test_public_names_have_an_example_that_runs(name):
    assert ">>> " in inspect.getdoc(getattr(metalr_hf, name)).partition("Example:")[2]


# What users and those who extend the package call; the other rooms serve these.
USED = (
    "calibration",
    "demo",
    "drawing",
    "folds",
    "history",
    "layers",
    "metrics",
    "plots",
    "report",
    "rules",
    "timm_models",
)


@pytest.mark.parametrize("room", USED)
def test_functions_have_an_example(room):
    module = import_module(f"metalr_hf.{room}")
    functions = [f for _, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__]
    public = [function for function in functions if not function.__name__.startswith("_")]
    assert public or room == "history"
    without = [function.__name__ for function in public if "Example:" not in inspect.getdoc(function)]
    assert not without
