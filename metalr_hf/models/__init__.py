"""Networks: timm models and plain PyTorch modules in the Trainer, U-Nets and their loss."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bare import Classifier
    from .demo import demo_image_processor, demo_model, demo_unet
    from .losses import segmentation_loss
    from .monai_networks import MonaiConfig, MonaiForSemanticSegmentation
    from .timm import wrap_timm_model
    from .unet import TimmUNetConfig, TimmUNetForSemanticSegmentation
    from .volume_processor import VolumeImageProcessor

__all__ = [
    "Classifier",
    "MonaiConfig",
    "MonaiForSemanticSegmentation",
    "TimmUNetConfig",
    "TimmUNetForSemanticSegmentation",
    "VolumeImageProcessor",
    "demo_image_processor",
    "demo_model",
    "demo_unet",
    "segmentation_loss",
    "wrap_timm_model",
]

_HOMES = {
    "Classifier": "bare",
    "MonaiConfig": "monai_networks",
    "MonaiForSemanticSegmentation": "monai_networks",
    "TimmUNetConfig": "unet",
    "TimmUNetForSemanticSegmentation": "unet",
    "VolumeImageProcessor": "volume_processor",
    "demo_image_processor": "demo",
    "demo_model": "demo",
    "demo_unet": "demo",
    "segmentation_loss": "losses",
    "wrap_timm_model": "timm",
}


def __getattr__(name: str) -> Any:
    # Imported at first use: the Trainer looks into this package, and most users need neither timm nor a U-Net.
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
