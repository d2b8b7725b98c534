"""Which image it was, when a run has stopped for one."""

import errno

import datasets
import pytest
from digits import digit_images

from metalr_hf.cli.broken_images import name_broken_image


def test_a_file_that_has_gone_is_named_and_a_full_disk_is_no_image(tmp_path):
    images, _ = digit_images(3)
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    rows = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    (tmp_path / "1.png").unlink()
    name_broken_image(OSError(errno.ENOSPC, "No space left on device"), {"training": rows})
    with pytest.raises(ValueError, match=r"Row 1 of the training images \(.*1.png\) cannot be read: .*No such file"):
        name_broken_image(FileNotFoundError(errno.ENOENT, "No such file"), {"training": rows})
