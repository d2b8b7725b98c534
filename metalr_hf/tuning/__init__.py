"""How learning rates start and change. It needs only torch and works in any training loop."""

from .averaging import WeightAverage
from .contexts import untouched
from .fresh_head import fit_head
from .history import LRHistory
from .rules import Rule, register_rule
from .scheduler import MetaLRScheduler

__all__ = ["LRHistory", "MetaLRScheduler", "Rule", "WeightAverage", "fit_head", "register_rule", "untouched"]
