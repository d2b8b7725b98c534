"""How learning rates start and change. It needs only torch and works in any training loop."""

from .averaging import WeightAverage
from .contexts import untouched
from .history import LRHistory
from .ridge import fit_head
from .rules import Rule, register_rule
from .scheduler import MetaLRScheduler

__all__ = ["LRHistory", "MetaLRScheduler", "Rule", "WeightAverage", "fit_head", "register_rule", "untouched"]
