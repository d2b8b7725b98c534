"""U-Nets on timm encoders, as models of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput

from .losses import IGNORE_INDEX, segmentation_loss


class TimmUNetConfig(PreTrainedConfig):
    """Configuration of a [`TimmUNetForSemanticSegmentation`].

    Args:
        encoder (`str`, *optional*, defaults to `"resnet18"`): Name of a timm architecture with feature maps.
        encoder_args (`Mapping[str, Any]`, *optional*):
            Further arguments of `timm.create_model`, such as `in_chans`, `img_size` or `out_indices`.
        decoder_channels (`Sequence[int]`, *optional*, defaults to `(256, 128, 64, 32, 16)`):
            Channels of the decoder's blocks, from the deepest to the one at the size of the image. Of an encoder with
            fewer feature maps the last ones are used, for one with more the first is repeated.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255): Class id of pixels that do not count.
        **kwargs: To `PreTrainedConfig`: `num_labels`, `id2label` ...

    Example:

    ```python
    >>> from metalr_hf.models.unet import TimmUNetConfig
    >>> TimmUNetConfig(encoder="test_resnet", num_labels=2).model_type
    'timm_unet'

    ```
    """

    model_type = "timm_unet"

    def __init__(
        self,
        encoder: str = "resnet18",
        encoder_args: Mapping[str, Any] | None = None,
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
        semantic_loss_ignore_index: int = IGNORE_INDEX,
        **kwargs: Any,
    ):
        self.encoder = encoder
        self.encoder_args = dict(encoder_args or {})
        self.decoder_channels = list(decoder_channels)
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        super().__init__(**kwargs)


class TimmUNetBlock(nn.Module):
    """Upsamples to the size of the skip connection, joins both, and convolves twice.

    Args:
        in_channels (`int`): Channels from below.
        skip_channels (`int`): Channels of the encoder's feature map; 0 for none.
        out_channels (`int`): Channels of the result.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.unet import TimmUNetBlock
    >>> block = TimmUNetBlock(in_channels=8, skip_channels=4, out_channels=2)
    >>> block(torch.zeros(1, 8, 16, 16), skip=torch.zeros(1, 4, 32, 32), size=(32, 32)).shape
    torch.Size([1, 2, 32, 32])

    ```
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels + skip_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, hidden: Tensor, skip: Tensor | None, size: Sequence[int]) -> Tensor:
        """`(batch, in_channels, ...)` to `(batch, out_channels, *size)`."""
        hidden = functional.interpolate(hidden, size=list(size), mode="nearest")
        if skip is not None:
            hidden = torch.cat([hidden, skip], dim=1)
        hidden = functional.relu(self.norm1(self.conv1(hidden)))
        return functional.relu(self.norm2(self.conv2(hidden)))


class TimmUNetForSemanticSegmentation(PreTrainedModel):
    """A U-Net (Ronneberger et al. 2015) whose encoder is a timm network with `features_only=True`.

    The loss is cross-entropy plus Dice, see [`~metalr_hf.models.losses.segmentation_loss`]. A saved one reloads with
    `AutoModelForSemanticSegmentation.from_pretrained(folder)` after `import metalr_hf.models.unet`, or with
    `trust_remote_code=True` where this package is not installed: its code is saved beside it.

    Args:
        config ([`TimmUNetConfig`]): Its configuration; the weights are untrained.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.unet import TimmUNetForSemanticSegmentation
    >>> model = TimmUNetForSemanticSegmentation.from_encoder("test_resnet", pretrained=False, num_labels=2)
    >>> model(torch.zeros(1, 3, 64, 64)).logits.shape
    torch.Size([1, 2, 64, 64])

    ```
    """

    config_class = TimmUNetConfig
    main_input_name = "pixel_values"
    base_model_prefix = "encoder"
    # The loss is the mean over a batch; Trainer handles gradient accumulation.
    accepts_loss_kwargs = False
    config: TimmUNetConfig

    def __init__(self, config: TimmUNetConfig):
        super().__init__(config)
        import timm

        encoder: Any = timm.create_model(config.encoder, pretrained=False, features_only=True, **config.encoder_args)
        self.encoder = encoder
        skips = list(reversed(encoder.feature_info.channels()))
        # The last entries belong to the finest resolutions, whatever the number of feature maps.
        deeper = len(skips) - len(config.decoder_channels)
        widths = config.decoder_channels[:1] * deeper + config.decoder_channels[max(0, -deeper) :]
        self.decoder = nn.ModuleList(
            TimmUNetBlock(below, skip, width)
            for below, skip, width in zip([skips[0], *widths], [*skips[1:], 0], widths, strict=False)
        )
        self.head = nn.Conv2d(widths[-1], config.num_labels or 0, 1)
        self.post_init()

    @classmethod
    def from_encoder(
        cls, encoder: str, pretrained: bool = True, encoder_args: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> TimmUNetForSemanticSegmentation:
        """Makes a U-Net on a pretrained encoder, with a fresh decoder.

        Args:
            encoder (`str`): What `timm.create_model` takes: a name, `hf-hub:...` or `local-dir:...`.
            pretrained (`bool`, *optional*, defaults to `True`): Load the encoder's weights.
            encoder_args (`Mapping[str, Any]`, *optional*): Further arguments of `timm.create_model`.
            **kwargs: To [`TimmUNetConfig`]: `num_labels`, `id2label`, `decoder_channels` ...

        Returns:
            [`TimmUNetForSemanticSegmentation`]
        """
        import timm

        network: Any = timm.create_model(encoder, pretrained=pretrained, features_only=True, **(encoder_args or {}))
        name = network.pretrained_cfg.get("architecture") or encoder
        model = cls(cls.config_class(encoder=name, encoder_args=encoder_args, **kwargs))
        model.encoder.load_state_dict(network.state_dict())
        # The expected mean, standard deviation and size of the images.
        model.encoder.pretrained_cfg = network.pretrained_cfg
        return model

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> SemanticSegmenterOutput | tuple[Tensor, ...]:
        """Loss (if there are labels) and logits.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): Images.
            labels (`torch.Tensor` of shape `(batch, height, width)`, int64, *optional*): Class ids.
            return_dict (`bool`, *optional*): Return an output object, the default, or a tuple.

        Returns:
            `SemanticSegmenterOutput`: `logits` of shape `(batch, classes, height, width)`.
        """
        features = list(self.encoder(pixel_values))
        if str(getattr(self.encoder, "output_fmt", "NCHW")).endswith("NHWC"):
            features = [feature.movedim(-1, 1) for feature in features]
        hidden, *skips = reversed(features)
        for block, skip in zip(self.decoder, [*skips, None], strict=True):
            hidden = block(hidden, skip, (pixel_values if skip is None else skip).shape[2:])
        logits = self.head(hidden)
        loss = None
        if labels is not None:
            loss = segmentation_loss(logits, labels, ignore_index=self.config.semantic_loss_ignore_index)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SemanticSegmenterOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        # timm has initialised the encoder.
        head: Any = self.head
        if isinstance(module, TimmUNetBlock):
            for conv in (module.conv1, module.conv2):
                init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            for norm in (module.norm1, module.norm2):
                super()._init_weights(norm)
        elif module is head:
            init.xavier_uniform_(head.weight)
            init.zeros_(head.bias)
        elif hasattr(module, "init_non_persistent_buffers"):
            # Checkpoints do not contain these buffers, and transformers loads into modules on the meta device.
            module.init_non_persistent_buffers()


AutoConfig.register(TimmUNetConfig.model_type, TimmUNetConfig)
AutoModelForSemanticSegmentation.register(TimmUNetConfig, TimmUNetForSemanticSegmentation)
TimmUNetConfig.register_for_auto_class()
TimmUNetForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
