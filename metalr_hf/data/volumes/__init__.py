"""Volumes with masks: NIfTI files and folders of them, to patches that a network takes."""

from .arguments import VolumeArguments
from .loading import VolumeSplits, load_volumes
from .transforms import VolumeTransform, collate_volumes

__all__ = ["VolumeArguments", "VolumeSplits", "VolumeTransform", "collate_volumes", "load_volumes"]
