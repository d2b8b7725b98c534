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


# Rooms in which everything public has one: what users and those who extend the package call. The others serve these,
# or could show nothing without a network or a long run.
SHOWN = (
    "bare_modules",
    "calibration",
    "collapse",
    "columns",
    "contexts",
    "demo",
    "demo_cells",
    "displacement",
    "drawing",
    "folds",
    "guard",
    "history",
    "hypergradient",
    "layer_names",
    "layer_rates",
    "layer_sources",
    "layer_structure",
    "layers",
    "linearity",
    "losses",
    "markdown",
    "messages",
    "meta_stream",
    "metrics",
    "plots",
    "report",
    "results",
    "rules",
    "scheduler",
    "schedules",
    "timm_models",
    "trainer",
    "training_args",
    "unet",
    "unet3d",
)


@pytest.mark.parametrize("room", SHOWN)
def test_functions_and_classes_have_an_example(room):
    module = import_module(f"metalr_hf.{room}")
    things = [thing for thing in vars(module).values() if inspect.isfunction(thing) or inspect.isclass(thing)]
    public = [one for one in things if one.__module__ == module.__name__ and not one.__name__.startswith("_")]
    assert public
    assert not [one.__name__ for one in public if "Example:" not in inspect.getdoc(one)]


def said_of(function):
    """Which of Args and Returns the docstring of a function has to have."""
    signature = inspect.signature(function)
    result = signature.return_annotation
    # A context manager gives nothing; its decorator hides that.
    returns = result not in (None, "None", "Iterator[None]", inspect.Signature.empty)
    return [head for head, wanted in {"Args:": signature.parameters, "Returns:": returns}.items() if wanted]


@pytest.mark.parametrize("room", ROOMS)
def test_functions_say_what_they_take_and_return(room):
    module = import_module(f"metalr_hf.{room}")
    own = [
        thing for thing in vars(module).values() if inspect.isfunction(thing) and thing.__module__ == module.__name__
    ]
    # A strategy is a function from a Job to a Trainer, which Strategy says.
    strategies = [strategy.make_trainer for strategy in STRATEGIES.values()]
    public = [one for one in own if not one.__name__.startswith("_") and one not in strategies]
    missing = {
        (one.__name__, head) for one in public for head in said_of(one) if head not in (inspect.getdoc(one) or "")
    }
    assert not missing
