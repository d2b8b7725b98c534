"""Folders of small volumes in nnU-Net's layout, with a bright box to find in noise."""

import json
from pathlib import Path

import nibabel
import numpy as np

LABELS = {"background": 0, "organ": 1, "lesion": 2}
QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no", "--per_device_train_batch_size", "2"]
SMALL = ["--network_args", '{"filters": [4, 8, 8]}', "--patch_size", "16", "16", "8"]


def volume(seed=0, shape=(18, 16, 10), spacing=(1.0, 1.0, 2.0), axcodes="RAS", dtype=np.int16):
    """An image and its mask: the same body, stored with its axes as `axcodes` says."""
    random = np.random.default_rng(seed)
    mask = np.zeros(shape, dtype=np.uint8)
    mask[4:13, 3:12, 2:8] = 1
    mask[6:10, 5:9, 3:6] = 2
    image = (np.array([0.0, 100.0, 200.0])[mask] + random.normal(0, 15, shape)).astype(dtype)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-7.0, 3.0, 11.0)
    return tuple(_turned(nibabel.Nifti1Image(voxels, affine), axcodes) for voxels in (image, mask))


def _turned(image, axcodes):
    now = nibabel.orientations.io_orientation(image.affine)
    return image.as_reoriented(nibabel.orientations.ornt_transform(now, nibabel.orientations.axcodes2ornt(axcodes)))


def save_folder(folder, train=6, test=2, channels=1, channel="MRI", **changes):
    """Writes a folder; volumes differ in size, voxel size and orientation."""
    folder = Path(folder)
    for part, count in (("Tr", train), ("Ts", test)):
        for kind in ("images", "labels"):
            (folder / f"{kind}{part}").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            shape, spacing = ((18, 16, 10), (1.0, 1.0, 2.0)) if i % 2 == 0 else ((16, 18, 12), (1.0, 1.0, 2.0))
            image, mask = volume(i, shape, spacing, ("RAS", "LPS", "SRA")[i % 3])
            for c in range(channels):
                nibabel.save(image, folder / f"images{part}" / f"case_{i:03}_{c:04}.nii.gz")
            nibabel.save(mask, folder / f"labels{part}" / f"case_{i:03}.nii.gz")
    said = {"channel_names": {str(c): channel for c in range(channels)}, "labels": LABELS, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(said | changes))
    return folder
