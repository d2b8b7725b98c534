"""The subclass of transformers' Trainer, its arguments and its checkpoints."""

from .arguments import MetaLRTrainingArguments
from .metalr import MetaLRTrainer

__all__ = ["MetaLRTrainer", "MetaLRTrainingArguments"]
