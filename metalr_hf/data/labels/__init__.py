"""What is to be learned of an image, in one form: a class, several labels or numbers; and weights of rare classes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .imbalance import ClassArguments
    from .quantities import QuantityArguments, load_quantities
    from .sets import LabelSetArguments, load_label_sets
    from .targets import TargetArguments

__all__ = [
    "ClassArguments",
    "LabelSetArguments",
    "QuantityArguments",
    "TargetArguments",
    "load_label_sets",
    "load_quantities",
]

_HOMES = {
    "ClassArguments": "imbalance",
    "LabelSetArguments": "sets",
    "QuantityArguments": "quantities",
    "TargetArguments": "targets",
    "load_label_sets": "sets",
    "load_quantities": "quantities",
}


def __getattr__(name: str) -> Any:
    # Imported at first use: the loader of images needs the classes, and the other modules the loader.
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
