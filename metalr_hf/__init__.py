"""MetaLR for Hugging Face: fine-tune a pretrained vision model with one meta-tuned learning rate per layer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .layers import layer_groups
    from .plots import plot_learning_rates
    from .trainer import MetaLRTrainer, MetaLRTrainingArguments
    from .tuning import LRHistory, MetaLRScheduler, WeightAverage

__version__ = "0.1.0"

__all__ = [
    "LRHistory",
    "MetaLRScheduler",
    "MetaLRTrainer",
    "MetaLRTrainingArguments",
    "WeightAverage",
    "layer_groups",
    "plot_learning_rates",
]

_HOMES = {
    "LRHistory": "tuning",
    "MetaLRScheduler": "tuning",
    "MetaLRTrainer": "trainer",
    "MetaLRTrainingArguments": "trainer",
    "WeightAverage": "tuning",
    "layer_groups": "layers",
    "plot_learning_rates": "plots",
}


def __getattr__(name: str) -> Any:
    # Imported at first use: the Trainer takes seconds, and most users need neither timm nor matplotlib.
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
