"""The hypergradient: the derivative of the validation loss by the learning rate of every layer's last step."""

from .look_ahead import LookAhead

__all__ = [
    "LookAhead",
]
