"""Which volumes are trained on, and how they are prepared."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...settings import check_choice
from ..masks import MaskArguments

NORMALIZATIONS = ("zscore", "ct")


@dataclass
class VolumeArguments(MaskArguments):
    """Where volumes with masks come from and how they are prepared.

    Args:
        spacing (`list[float]`, *optional*):
            Size in mm of a voxel from left to right, back to front and bottom to top, to which all volumes are brought.
            By default the median of the training volumes. Results are measured at each volume's own size.
        patch_size (`list[int]`, *optional*):
            Voxels along these axes that the network sees at once. By default what most volumes have, up to 96³ voxels.
        normalization (`str`, *optional*):
            `zscore`: by mean and deviation of each volume. `ct`: intensities outside the window are cut off, and what
            is subtracted and divided by is the same for all volumes. By default `ct` where dataset.json says so.
        intensity_window (`list[str]`, *optional*):
            Lowest and highest intensity that count, in the units of the files: for CT, `-160 240`. By default, with
            `ct`, percentiles of the training volumes' foreground.
        network_args (`str`, *optional*):
            Arguments of MONAI's network as JSON, such as `{"filters": [16, 32, 64]}`.

    All others are those of [`~metalr_hf.data.masks.MaskArguments`]; `image_size` and
    `num_channels` have no meaning here.

    Example:

    ```python
    >>> from metalr_hf.data.volumes import VolumeArguments
    >>> VolumeArguments(dataset_name="Task04_Hippocampus", intensity_window=["-160", "240"]).window
    (-160.0, 240.0)

    ```
    """

    spacing: list[float] | None = field(
        default=None,
        metadata={
            "help": "Size in mm of a voxel from left to right, back to front and bottom to top, to which all volumes "
            "are brought. By default the median of the training volumes. Results are measured at each volume's own "
            "size."
        },
    )
    patch_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Voxels along these axes that the network sees at once. By default what most volumes have, up to "
            "96³ voxels."
        },
    )
    normalization: str | None = field(
        default=None,
        metadata={
            "help": "`zscore`: by mean and deviation of each volume. `ct`: intensities outside the window are cut off, "
            "and what is subtracted and divided by is the same for all volumes. By default `ct` where dataset.json "
            "says so."
        },
    )
    intensity_window: list[str] | None = field(
        default=None,
        metadata={
            "help": "Lowest and highest intensity that count, in the units of the files: for CT, `-160 240`. By "
            "default, with `ct`, percentiles of the training volumes' foreground."
        },
    )
    network_args: str | None = field(
        default=None,
        metadata={"help": 'Arguments of MONAI\'s network as JSON, such as `{"filters": [16, 32, 64]}`.'},
    )
    default_metrics: ClassVar[tuple[str, ...]] = ("dice", "hausdorff95")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalization is not None:
            check_choice("normalization", self.normalization, NORMALIZATIONS)
        if self.streaming:
            raise ValueError("streaming: volumes are looked at before they are trained on. Leave it out.")
        if self.image_size is not None:
            raise ValueError(f"image_size={self.image_size}: the size of volumes is set with patch_size.")
        for name in ("spacing", "patch_size"):
            values = getattr(self, name)
            if values is not None and (len(values) != 3 or not all(0 < value < math.inf for value in values)):
                raise ValueError(f"{name}={values!r} must be three positive numbers, one for each axis.")
        if self.normalization == "zscore" and self.intensity_window is not None:
            raise ValueError("intensity_window belongs to normalization='ct'; with zscore leave it out.")
        if self.intensity_window is not None and len(self.intensity_window) != 2:
            raise ValueError(f"intensity_window={self.intensity_window!r}: volumes take two numbers, as in -160 240.")
        if self.num_channels is not None:
            raise ValueError(f"num_channels={self.num_channels}: volumes have the channels that their files have.")
        if not isinstance(self.network_options, dict):
            raise ValueError(f"network_args={self.network_args!r} must be a JSON object: names and values.")

    @property
    def window(self) -> tuple[float, float] | None:
        """The intensity window that was given."""
        if self.intensity_window is None:
            return None
        low, high = map(float, self.intensity_window)
        return low, high

    @property
    def network_options(self) -> dict[str, Any]:
        """The arguments of the network that were given."""
        try:
            return json.loads(self.network_args or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"network_args={self.network_args!r} is no JSON: {error}") from error
