"""What comes before and after a network for volumes: NIfTI files to its inputs, and its outputs to NIfTI."""

from __future__ import annotations

import gzip
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, BaseImageProcessor, BatchFeature

from .losses import resize_logits
from .monai_networks import PATCH_SIZE, MonaiConfig

# Left to right, back to front, bottom to top.
ORIENTATION = "RAS"
# Of a NIfTI header: where its voxels lie.
GEOMETRY_FIELDS = (
    *("pixdim", "xyzt_units", "qform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "sform_code", "srow_x", "srow_y", "srow_z"),
)
GZIP = b"\x1f\x8b"


class VolumeImageProcessor(BaseImageProcessor):
    """Volumes as a network takes them: in one orientation and voxel size, their intensities in one scale.

    Args:
        spacing (`Sequence[float]`, *optional*, defaults to `(1.0, 1.0, 1.0)`):
            Size in mm of a voxel from left to right, back to front and bottom to top.
        patch_size (`Sequence[int]`, *optional*, defaults to `(96, 96, 96)`): Voxels that the network sees at once.
        window (`Sequence[float]`, *optional*):
            The lowest and the highest intensity that count, in the units of the files, such as Hounsfield units.
        mean (`float`, *optional*): What is subtracted after that; by default the mean of each volume and channel.
        std (`float`, *optional*): By what it is then divided; by default the deviation of each volume and channel.

    Example:

    ```python
    >>> import nibabel
    >>> import numpy as np
    >>> from metalr_hf.models.volume_processor import VolumeImageProcessor
    >>> scan = nibabel.Nifti1Image(np.zeros((10, 20, 5), dtype=np.int16), affine=np.diag([1.0, 1.0, 4.0, 1.0]))
    >>> processor = VolumeImageProcessor(spacing=(2, 2, 4), window=(-160, 240), mean=40, std=200)
    >>> processor(scan, return_tensors="pt")["pixel_values"].shape
    torch.Size([1, 1, 5, 10, 5])

    ```
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        patch_size: Sequence[int] = PATCH_SIZE,
        window: Sequence[float] | None = None,
        mean: float | None = None,
        std: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.spacing = [float(mm) for mm in spacing]
        self.patch_size = [int(voxels) for voxels in patch_size]
        self.window = None if window is None else [float(value) for value in window]
        self.mean, self.std = mean, std

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """See [`~VolumeImageProcessor.preprocess`]."""
        return self.preprocess(images, *args, **kwargs)

    def preprocess(
        self, images: Any, segmentation_maps: Any = None, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Prepares one volume or several, and their masks.

        Args:
            images (`str`, `nibabel.Nifti1Image`, `dict` or `list` of these):
                A file, an image that has been opened, or what an undecoded `datasets.Nifti` column holds. A list is
                several volumes, a list in it one volume whose channels are files of their own.
            segmentation_maps (the same, *optional*): Masks that hold class ids.
            return_tensors (`str`, *optional*): `"pt"` makes one tensor of volumes that have become equal in size.

        Returns:
            `BatchFeature`: `pixel_values`, of shape `(channels, x, y, z)` each, and `labels` of shape `(x, y, z)`.
        """
        data = {"pixel_values": [self.prepare(self.read(image)) for image in _listed(images)]}
        if segmentation_maps is not None:
            masks = [self.read(mask) for mask in _listed(segmentation_maps)]
            data["labels"] = [self.resample(mask, "nearest-exact")[0].long() for mask in masks]
        if return_tensors == "pt":
            return BatchFeature({name: torch.stack(tensors) for name, tensors in data.items()})
        return BatchFeature(data)

    def read(self, image: Any) -> Any:
        """Reads a volume and turns it from left to right, back to front and bottom to top.

        Args:
            image (`str`, `nibabel.Nifti1Image`, `dict` or `list` of these): A volume, or its channels.

        Returns:
            `monai.data.MetaTensor` of shape `(channels, x, y, z)`, float32
        """
        from monai.data import MetaTensor
        from monai.transforms import Orientation

        opened = [open_nifti(entry) for entry in _listed(image)]
        if not all(np.allclose(one.affine, opened[0].affine, atol=0.01) for one in opened):
            raise ValueError(
                "The channels of a volume have different affines, so that their voxels lie in different places. "
                "Resample them to the first, or copy its affine if you know that the voxels belong together."
            )
        arrays = [np.asarray(one.get_fdata(dtype=np.float32, caching="unchanged")) for one in opened]
        # Several channels in one file are its last axis.
        channels = [array[..., None] if array.ndim == 3 else array for array in arrays]
        values = torch.from_numpy(np.concatenate(channels, axis=-1)).movedim(-1, 0)
        return Orientation(ORIENTATION, labels=None)(
            MetaTensor(values.contiguous(), affine=torch.as_tensor(opened[0].affine))
        )

    def prepare(self, volume: Any) -> Tensor:
        """Brings a volume to the voxel size and the scale of intensities that the network takes.

        Args:
            volume (`monai.data.MetaTensor` of shape `(channels, x, y, z)`): What [`~VolumeImageProcessor.read`] gave.

        Returns:
            `torch.Tensor` of shape `(channels, x, y, z)`, float32
        """
        from monai.transforms import NormalizeIntensity

        resampled = self.resample(volume, "trilinear")
        if self.window is not None:
            resampled = resampled.clamp(*self.window)
        normalize: Any = NormalizeIntensity
        return normalize(self.mean, self.std, channel_wise=self.mean is None)(resampled).as_tensor().float()

    def resample(self, volume: Any, mode: str) -> Any:
        """Brings a volume to the voxel size that the network takes.

        It covers the same space before and after, so that outputs are brought back by interpolation alone.

        Args:
            volume (`monai.data.MetaTensor` of shape `(channels, x, y, z)`): What [`~VolumeImageProcessor.read`] gave.
            mode (`str`): Of the interpolation, as `monai.transforms.Resize` names it.

        Returns:
            `monai.data.MetaTensor` of shape `(channels, x, y, z)`
        """
        from monai.transforms import Resize

        sizes = zip(volume.shape[1:], volume.pixdim.tolist(), self.spacing, strict=True)
        size = [max(1, round(voxels * mm / wanted)) for voxels, mm, wanted in sizes]
        smooth = mode == "trilinear" and any(new < old for new, old in zip(size, volume.shape[1:], strict=True))
        return Resize(size, mode=mode, anti_aliasing=smooth)(volume)

    def post_process_semantic_segmentation(self, outputs: Any, images: Any) -> list[Any]:
        """Masks of a network's outputs, in the geometry of the volumes that they are of.

        Args:
            outputs (`SemanticSegmenterOutput`): With `logits` of shape `(batch, classes, x, y, z)`.
            images (as in [`~VolumeImageProcessor.preprocess`]): The volumes that were prepared.

        Returns:
            `list[nibabel.Nifti1Image]`: class ids.
        """
        return masks_of(outputs.logits, [open_nifti(_listed(image)[0]) for image in _listed(images)])


@dataclass(frozen=True)
class NiftiFrame:
    """Where the voxels of a NIfTI file lie, without the voxels.

    Args:
        shape (`tuple[int, ...]`): Voxels along each axis of the file.
        affine (`numpy.ndarray` of shape `(4, 4)`): Where they lie.
        header (`nibabel.Nifti1Header`): The header of the file.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    header: Any

    @classmethod
    def of(cls, image: Any) -> NiftiFrame:
        """That of an image that is open.

        Args:
            image (`nibabel.Nifti1Image`): The image.

        Returns:
            [`NiftiFrame`]
        """
        return cls(tuple(image.shape), image.affine, image.header)


def masks_of(logits: Tensor, sources: Sequence[Any]) -> list[Any]:
    """Masks of a network's outputs, in the geometry of the volumes that they are of.

    Args:
        logits (`torch.Tensor` of shape `(batch, classes, x, y, z)`): What the network gave.
        sources (`Sequence` of `nibabel.Nifti1Image` or [`NiftiFrame`]): The volumes that were prepared.

    Returns:
        `list[nibabel.Nifti1Image]`: class ids.

    Example:

    ```python
    >>> import nibabel
    >>> import numpy as np
    >>> import torch
    >>> from metalr_hf.models.volume_processor import masks_of
    >>> scan = nibabel.Nifti1Image(np.zeros((10, 20, 5)), affine=np.diag([-1.0, 1.0, 4.0, 1.0]))
    >>> masks_of(torch.zeros(1, 3, 5, 10, 5), [scan])[0].shape
    (10, 20, 5)

    ```
    """
    import nibabel

    masks = []
    for one, source in zip(logits, sources, strict=True):
        turned = nibabel.orientations.io_orientation(source.affine)
        # The axes of the source in the order in which the network sees them.
        order = np.argsort(turned[:, 0])
        size = torch.Size([source.shape[axis] for axis in order])
        ids = resize_logits(one[None].float(), size)[0].argmax(0)
        ids = ids.flip([axis for axis in range(3) if turned[order[axis], 1] < 0])
        back = ids.permute(*(int(axis) for axis in turned[:, 0]))
        masks.append(mask_like(back.cpu().numpy(), source))
    return masks


def mask_like(ids: np.ndarray, source: Any) -> Any:
    """A NIfTI mask that lies where its source does; of its header nothing else is taken, such as a description.

    Args:
        ids (`numpy.ndarray`): Class ids, with the axes of the source.
        source (`nibabel.Nifti1Image` or [`NiftiFrame`]): The image that it is a mask of.

    Returns:
        `nibabel.Nifti1Image`
    """
    import nibabel

    mask = nibabel.Nifti1Image(ids.astype(np.uint8), source.affine)
    if isinstance(source.header, nibabel.Nifti1Header):
        # Programs differ in which of the two affines they go by, and in what they make of their codes.
        for field in GEOMETRY_FIELDS:
            mask.header[field] = source.header[field]
    return mask


def open_nifti(entry: Any) -> Any:
    """Opens a NIfTI image; its voxels are read when they are asked for.

    Args:
        entry (`str`, `os.PathLike`, `dict` or `nibabel.Nifti1Image`): A file, `bytes` or `path` in a dictionary, or an
            image that is open already.

    Returns:
        `nibabel.Nifti1Image`
    """
    import nibabel

    if isinstance(entry, Mapping):
        content = entry.get("bytes")
        if content is not None:
            return nibabel.Nifti1Image.from_bytes(gzip.decompress(content) if content[:2] == GZIP else content)
        entry = entry["path"]
    return nibabel.load(entry) if isinstance(entry, (str, os.PathLike)) else entry


def nifti_bytes(voxels: np.ndarray, affine: np.ndarray) -> bytes:
    """A NIfTI file of voxels.

    Args:
        voxels (`numpy.ndarray` of shape `(x, y, z)`): Values.
        affine (`numpy.ndarray` of shape `(4, 4)`): Where they lie.

    Returns:
        `bytes`
    """
    import nibabel

    return nibabel.Nifti1Image(voxels, affine).to_bytes()


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


# By the name of the backend that transformers asks for first, so that it does not warn that it is missing.
AutoImageProcessor.register(MonaiConfig, image_processor_classes={"torchvision": VolumeImageProcessor})
VolumeImageProcessor.register_for_auto_class("AutoImageProcessor")
