"""Which rows a run trains, evaluates and is tested on: shares held out, folds, and groups that stay together."""

from .folds import flip_labels, fold_rows, stratified_subset
from .held_out import ImageSplits, SplitNames, Splits, arrange, divide, hold_out

__all__ = [
    "ImageSplits",
    "SplitNames",
    "Splits",
    "arrange",
    "divide",
    "flip_labels",
    "fold_rows",
    "hold_out",
    "stratified_subset",
]
