"""A 3-D U-Net for volumes, as a model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput

from .losses import IGNORE_INDEX, segmentation_loss


class UNet3DConfig(PreTrainedConfig):
    """Configuration of a [`UNet3DForSemanticSegmentation`].

    Args:
        num_channels (`int`, *optional*, defaults to 1): Channels of the volumes.
        hidden_sizes (`Sequence[int]`, *optional*, defaults to `(16, 32, 64, 128)`): Channels of the levels.
        strides (`Sequence[Sequence[int]]`, *optional*):
            Depth, height and width by which each level but the first is coarser than the one before. By default
            `(1, 2, 2)` and then `(2, 2, 2)`: the slices of a stack lie further apart than its pixels.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255): Class id of voxels that do not count.
        **kwargs: To `PreTrainedConfig`: `num_labels`, `id2label` ...

    Raises:
        ValueError: if there is not one stride for each level but the first.

    Example:

    ```python
    >>> from metalr_hf.models.unet3d import UNet3DConfig
    >>> UNet3DConfig(hidden_sizes=(8, 16, 32), num_labels=2).strides
    [[1, 2, 2], [2, 2, 2]]

    ```
    """

    model_type = "unet3d"

    def __init__(
        self,
        num_channels: int = 1,
        hidden_sizes: Sequence[int] = (16, 32, 64, 128),
        strides: Sequence[Sequence[int]] | None = None,
        semantic_loss_ignore_index: int = IGNORE_INDEX,
        **kwargs: Any,
    ):
        self.num_channels = num_channels
        self.hidden_sizes = list(hidden_sizes)
        coarser = len(self.hidden_sizes) - 1
        if strides is None:
            strides = [[1, 2, 2], *([2, 2, 2] for _ in range(coarser - 1))]
        self.strides = [list(stride) for stride in strides]
        if len(self.strides) != coarser:
            raise ValueError(
                f"strides={strides} must have {coarser} entries: one for each level of hidden_sizes="
                f"{self.hidden_sizes} but the first."
            )
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        super().__init__(**kwargs)


class UNet3DBlock(nn.Module):
    """Two convolutions, each with instance norm and a leaky ReLU.

    Args:
        in_channels (`int`): Channels of the input.
        out_channels (`int`): Channels of the result.
        stride (`Sequence[int]`, *optional*): Of the first convolution.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.unet3d import UNet3DBlock
    >>> UNet3DBlock(1, 8, stride=(1, 2, 2))(torch.zeros(1, 1, 4, 16, 16)).shape
    torch.Size([1, 8, 4, 8, 8])

    ```
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int] = (1, 1, 1)):
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, stride=tuple(stride), padding=1, bias=False)  # type: ignore[arg-type]
        self.norm1 = nn.InstanceNorm3d(out_channels, affine=True)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.InstanceNorm3d(out_channels, affine=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(batch, in_channels, depth, height, width)` to `(batch, out_channels, ...)`, smaller by the stride."""
        hidden = functional.leaky_relu(self.norm1(self.conv1(hidden)), 0.01)
        return functional.leaky_relu(self.norm2(self.conv2(hidden)), 0.01)


class UNet3DForSemanticSegmentation(PreTrainedModel):
    """A U-Net for volumes (Çiçek et al. 2016), with strides and norms as in nnU-Net (Isensee et al. 2021).

    The loss is cross-entropy plus Dice, see [`~metalr_hf.models.losses.segmentation_loss`]. A saved one reloads with
    `AutoModelForSemanticSegmentation.from_pretrained(folder)` after `import metalr_hf.models.unet3d`, or with
    `trust_remote_code=True` where this package is not installed: its code is saved beside it.

    Args:
        config ([`UNet3DConfig`]): Its configuration; the weights are untrained.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.unet3d import UNet3DConfig, UNet3DForSemanticSegmentation
    >>> model = UNet3DForSemanticSegmentation(UNet3DConfig(hidden_sizes=(4, 8), num_labels=2))
    >>> model(torch.zeros(1, 1, 4, 16, 16)).logits.shape
    torch.Size([1, 2, 4, 16, 16])

    ```
    """

    config_class = UNet3DConfig
    main_input_name = "pixel_values"
    base_model_prefix = "encoder"
    # The loss is the mean over a batch; Trainer handles gradient accumulation.
    accepts_loss_kwargs = False
    config: UNet3DConfig

    def __init__(self, config: UNet3DConfig):
        super().__init__(config)
        sizes = config.hidden_sizes
        self.encoder = nn.ModuleList(
            UNet3DBlock(above, width, stride)
            for above, width, stride in zip(
                [config.num_channels, *sizes], sizes, [[1, 1, 1], *config.strides], strict=False
            )
        )
        self.decoder = nn.ModuleList(
            UNet3DBlock(sizes[level + 1] + sizes[level], sizes[level]) for level in reversed(range(len(sizes) - 1))
        )
        self.head = nn.Conv3d(sizes[0], config.num_labels or 0, 1)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> SemanticSegmenterOutput | tuple[Tensor, ...]:
        """Loss (if there are labels) and logits.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, depth, height, width)`): Volumes.
            labels (`torch.Tensor` of shape `(batch, depth, height, width)`, int64, *optional*): Class ids.
            return_dict (`bool`, *optional*): Return an output object, the default, or a tuple.

        Returns:
            `SemanticSegmenterOutput`: `logits` of shape `(batch, classes, depth, height, width)`.
        """
        hidden, skips = pixel_values, []
        for block in self.encoder:
            hidden = block(hidden)
            skips.append(hidden)
        for block, skip in zip(self.decoder, reversed(skips[:-1]), strict=True):
            upsampled = functional.interpolate(hidden, size=skip.shape[2:], mode="nearest")
            hidden = block(torch.cat([upsampled, skip], dim=1))
        logits = self.head(hidden)
        loss = None
        if labels is not None:
            loss = segmentation_loss(logits, labels, ignore_index=self.config.semantic_loss_ignore_index)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SemanticSegmenterOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        head: Any = self.head
        if module is head:
            init.xavier_uniform_(head.weight)
            init.zeros_(head.bias)
        elif isinstance(module, nn.Conv3d):
            init.kaiming_normal_(module.weight, a=0.01, nonlinearity="leaky_relu")
        elif isinstance(module, nn.InstanceNorm3d):
            init.ones_(module.weight)
            init.zeros_(module.bias)


AutoConfig.register(UNet3DConfig.model_type, UNet3DConfig)
AutoModelForSemanticSegmentation.register(UNet3DConfig, UNet3DForSemanticSegmentation)
UNet3DConfig.register_for_auto_class()
UNet3DForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
