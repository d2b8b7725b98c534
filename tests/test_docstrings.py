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
def test_examples_run(room, monkeypatch):
    # What an example registers is gone after it.
    monkeypatch.setattr("metalr_hf.rules.RULES", {**RULES})
    monkeypatch.setattr("metalr_hf.strategies.STRATEGIES", {**STRATEGIES})
    failures, _ = doctest.testmod(import_module(f"metalr_hf.{room}"), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failures == 0


@pytest.mark.parametrize("name", metalr_hf.__all__)
def test_public_names_have_an_example(name):
    assert "Example:" in inspect.getdoc(getattr(metalr_hf, name))
