"""Which parameters form a layer."""

from .groups import check_layer_groups, layer_groups

__all__ = ["check_layer_groups", "layer_groups"]
