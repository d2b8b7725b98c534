"""What meets transformers' Trainer."""

from .arguments import MetaLRTrainingArguments
from .metalr import MetaLRTrainer

__all__ = ["MetaLRTrainer", "MetaLRTrainingArguments"]
