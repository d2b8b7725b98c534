"""MONAI's networks for volumes, as models of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput

from .losses import IGNORE_INDEX, segmentation_loss

PATCH_SIZE = (96, 96, 96)
# How far windows lie over each other, and how many go through the network at once.
OVERLAP, WINDOWS_AT_ONCE = 0.5, 4
# nnU-Net's widths and its limit to them.
FIRST_WIDTH, LARGEST_WIDTH, MOST_HALVINGS, SMALLEST_MAP = 32, 320, 5, 4
EXTRA = 'Networks for volumes need MONAI: pip install "metalr-hf[medical]"'


class MonaiConfig(PreTrainedConfig):
    """Configuration of a [`MonaiForSemanticSegmentation`].

    Args:
        network (`str`, *optional*, defaults to `"DynUNet"`): Name of a class in `monai.networks.nets`.
        network_args (`Mapping[str, Any]`, *optional*):
            Arguments of that class. Channels and classes need not be given, nor, for `DynUNet`, `UNet` and `SwinUNETR`,
            anything else: what is left out follows from the size of the patches.
        num_channels (`int`, *optional*, defaults to 1): Channels of the volumes.
        patch_size (`Sequence[int]`, *optional*, defaults to `(96, 96, 96)`):
            Voxels of what the network sees at once. Larger volumes are seen through windows of this size.
        spacing (`Sequence[float]`, *optional*, defaults to `(1.0, 1.0, 1.0)`): Size in mm of the voxels.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255): Class id of voxels that do not count.
        **kwargs: To `PreTrainedConfig`: `num_labels`, `id2label` ...

    Example:

    ```python
    >>> from metalr_hf.models.monai_networks import MonaiConfig
    >>> MonaiConfig(network="SegResNet", network_args={"init_filters": 8}, num_labels=2).model_type
    'monai'

    ```
    """

    model_type = "monai"

    def __init__(
        self,
        network: str = "DynUNet",
        network_args: Mapping[str, Any] | None = None,
        num_channels: int = 1,
        patch_size: Sequence[int] = PATCH_SIZE,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        semantic_loss_ignore_index: int = IGNORE_INDEX,
        **kwargs: Any,
    ):
        self.network = network
        self.network_args = dict(network_args or {})
        self.num_channels = num_channels
        self.patch_size = list(patch_size)
        self.spacing = list(spacing)
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        super().__init__(**kwargs)


class MonaiForSemanticSegmentation(PreTrainedModel):
    """A network of MONAI for volumes, with the loss and the outputs that transformers' segmentation networks have.

    While it is trained it takes patches. In evaluation mode it takes volumes of any size, and sees those that are no
    patch through overlapping windows (`monai.inferers.sliding_window_inference`). The loss is cross-entropy plus Dice,
    see [`~metalr_hf.models.losses.segmentation_loss`]. A saved one reloads with
    `AutoModelForSemanticSegmentation.from_pretrained(folder)` after `import metalr_hf.models.monai_networks`, or with
    `trust_remote_code=True` where MONAI is installed and this package is not: its code is saved beside it.

    Args:
        config ([`MonaiConfig`]): Its configuration; the weights are untrained.

    Raises:
        ImportError: if MONAI is not installed.
        ValueError: if MONAI has no such network, or it does not take the arguments.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.monai_networks import MonaiConfig, MonaiForSemanticSegmentation
    >>> args = {"channels": (4, 8), "strides": (2,)}
    >>> config = MonaiConfig(network="UNet", network_args=args, patch_size=(16, 16, 16), num_labels=2)
    >>> model = MonaiForSemanticSegmentation(config).eval()
    >>> model(torch.zeros(1, 1, 20, 24, 12)).logits.shape
    torch.Size([1, 2, 20, 24, 12])

    ```
    """

    config_class = MonaiConfig
    main_input_name = "pixel_values"
    base_model_prefix = "network"
    # The loss is the mean over a batch; Trainer handles gradient accumulation.
    accepts_loss_kwargs = False
    config: MonaiConfig

    def __init__(self, config: MonaiConfig):
        super().__init__(config)
        self.network = _network(config)
        self._tied_weights_keys = _other_names(self)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        spacing: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SemanticSegmenterOutput | tuple[Tensor, ...]:
        """Loss (if there are labels) and logits.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, x, y, z)`): Patches, or in evaluation volumes.
            labels (`torch.Tensor` of shape `(batch, x, y, z)`, int64, *optional*): Class ids.
            spacing (`torch.Tensor` of shape `(batch, 3)`, *optional*):
                Size in mm of the voxels of the masks, which metrics need; the network does not.
            return_dict (`bool`, *optional*): Return an output object, the default, or a tuple.

        Returns:
            `SemanticSegmenterOutput`: `logits` of shape `(batch, classes, x, y, z)`.
        """
        patch = self.config.patch_size
        if self.training or list(pixel_values.shape[2:]) == patch:
            logits = self.network(pixel_values)
        else:
            from monai.inferers import sliding_window_inference

            logits = sliding_window_inference(
                pixel_values, patch, WINDOWS_AT_ONCE, self.network, overlap=OVERLAP, mode="gaussian"
            )
        loss = None
        if labels is not None:
            loss = segmentation_loss(logits, labels, ignore_index=self.config.semantic_loss_ignore_index)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SemanticSegmenterOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
            init.kaiming_normal_(module.weight, a=0.01, nonlinearity="leaky_relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.InstanceNorm3d):
            if module.affine:
                init.ones_(module.weight)
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


def _network(config: MonaiConfig) -> nn.Module:
    try:
        from monai.networks import nets
    except ImportError as error:
        raise ImportError(EXTRA) from error
    kind = getattr(nets, config.network, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"network={config.network!r} is no network of MONAI (monai.networks.nets).")
    arguments: dict[str, Any] = {"in_channels": config.num_channels, "out_channels": config.num_labels}
    if config.network != "SwinUNETR":
        arguments["spatial_dims"] = len(config.patch_size)
    arguments |= _defaults(config) | config.network_args
    try:
        return kind(**arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"network={config.network!r} does not take network_args={config.network_args}: {error}") from (
            error
        )


def _defaults(config: MonaiConfig) -> dict[str, Any]:
    """Arguments that MONAI's class has no value for, or none that suits."""
    kernels, strides = kernels_and_strides(config.patch_size, config.spacing)
    widths = [min(FIRST_WIDTH * 2**level, LARGEST_WIDTH) for level in range(len(strides))]
    if config.network == "DynUNet":
        levels = len(config.network_args.get("filters", strides))
        kernels, strides = kernels[:levels], strides[:levels]
        return {
            "kernel_size": kernels,
            "strides": strides,
            "upsample_kernel_size": strides[1:],
            "filters": widths[:levels],
        }
    if config.network == "UNet":
        levels = len(config.network_args.get("channels", strides))
        return {"channels": widths[:levels], "strides": strides[1:levels], "num_res_units": 2}
    return {"feature_size": 24} if config.network == "SwinUNETR" else {}


def kernels_and_strides(size: Sequence[int], spacing: Sequence[float]) -> tuple[list[list[int]], list[list[int]]]:
    """Kernel sizes and strides of the levels of a U-Net, as nnU-Net chooses them (Isensee et al. 2021).

    An axis is halved as long as it stays at four voxels or more and its voxels are not more than twice as long as those
    of the others.

    Args:
        size (`Sequence[int]`): Voxels of a patch.
        spacing (`Sequence[float]`): Size of a voxel in mm.

    Returns:
        `tuple[list[list[int]], list[list[int]]]`: kernel sizes and strides, of each level.

    Example:

    ```python
    >>> from metalr_hf.models.monai_networks import kernels_and_strides
    >>> kernels_and_strides((32, 32, 8), (1.0, 1.0, 3.0))[1]
    [[1, 1, 1], [2, 2, 1], [2, 2, 2], [2, 2, 1]]

    ```
    """
    size, spacing = list(size), list(spacing)
    kernels, strides = [], [[1] * len(size)]
    while True:
        near = [mm <= 2 * min(spacing) for mm in spacing]
        kernels.append([3 if fine else 1 for fine in near])
        halved = [fine and voxels >= 2 * SMALLEST_MAP for fine, voxels in zip(near, size, strict=True)]
        if not any(halved) or len(strides) > MOST_HALVINGS:
            return kernels, strides
        strides.append([2 if half else 1 for half in halved])
        size = [voxels // 2 if half else voxels for half, voxels in zip(halved, size, strict=True)]
        spacing = [mm * 2 if half else mm for half, mm in zip(halved, spacing, strict=True)]


def _other_names(model: nn.Module) -> dict[str, str]:
    """Names of parameters that have another one, as DynUNet's have, to the first."""
    first: dict[int, str] = {}
    others = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            others[name] = first[id(parameter)]
    return others


AutoConfig.register(MonaiConfig.model_type, MonaiConfig)
AutoModelForSemanticSegmentation.register(MonaiConfig, MonaiForSemanticSegmentation)
MonaiConfig.register_for_auto_class()
MonaiForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
