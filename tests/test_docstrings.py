"""The examples in the docstrings run, and every public name has one."""

import doctest
import inspect
import pkgutil
from importlib import import_module

import pytest

import metalr_hf
from metalr_hf.compare.strategies import STRATEGIES
from metalr_hf.tuning.rules import RULES

MODULES = [
    module.name
    for module in pkgutil.walk_packages(metalr_hf.__path__, "metalr_hf.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, monkeypatch, tmp_path):
    # What an example registers or writes is gone after it.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("metalr_hf.tuning.rules.RULES", {**RULES})
    monkeypatch.setattr("metalr_hf.compare.strategies.registry.STRATEGIES", {**STRATEGIES})
    failures, _ = doctest.testmod(import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failures == 0


@pytest.mark.parametrize("name", metalr_hf.__all__)
def test_public_names_have_an_example_that_runs(name):
    assert ">>> " in inspect.getdoc(getattr(metalr_hf, name)).partition("Example:")[2]


# Modules in which everything public has one: what users and those who extend the package call. The others serve these,
# or could show nothing without a network or a long run.
SHOWN = (
    "metalr_hf.compare.report",
    "metalr_hf.compare.results",
    "metalr_hf.data.cells",
    "metalr_hf.data.columns",
    "metalr_hf.data.digits",
    "metalr_hf.data.splits.folds",
    "metalr_hf.data.splits.several_labels",
    "metalr_hf.hub.markdown",
    "metalr_hf.layers.groups",
    "metalr_hf.layers.names",
    "metalr_hf.layers.sources",
    "metalr_hf.layers.structure",
    "metalr_hf.messages",
    "metalr_hf.models.bare",
    "metalr_hf.models.demo",
    "metalr_hf.models.losses",
    "metalr_hf.models.timm",
    "metalr_hf.models.unet",
    "metalr_hf.plots.drawing",
    "metalr_hf.plots.learning_rates",
    "metalr_hf.tasks.metrics.classes",
    "metalr_hf.trainer.arguments",
    "metalr_hf.trainer.collapse",
    "metalr_hf.trainer.batches.stream",
    "metalr_hf.trainer.metalr",
    "metalr_hf.trainer.schedules",
    "metalr_hf.tuning.calibration.search",
    "metalr_hf.tuning.contexts",
    "metalr_hf.tuning.guard",
    "metalr_hf.tuning.history",
    "metalr_hf.tuning.hypergradient.displacement",
    "metalr_hf.tuning.hypergradient.linearity",
    "metalr_hf.tuning.hypergradient.look_ahead",
    "metalr_hf.tuning.rates",
    "metalr_hf.tuning.rules",
    "metalr_hf.tuning.scheduler",
)


@pytest.mark.parametrize("name", SHOWN)
def test_functions_and_classes_have_an_example(name):
    module = import_module(name)
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


@pytest.mark.parametrize("name", MODULES)
def test_functions_say_what_they_take_and_return(name):
    module = import_module(name)
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
