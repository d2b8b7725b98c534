"""The hypergradient: by how much the last optimizer step of every layer lowered the validation loss."""

from .look_ahead import LookAhead

__all__ = [
    "LookAhead",
]
