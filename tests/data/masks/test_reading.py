import json

import numpy as np
import pytest
import tifffile

from metalr_hf.data.masks import MaskArguments, load_masks, read_mask

pytestmark = pytest.mark.usefixtures("offline")

IDS = np.repeat(np.array([[0], [1]], "uint8"), [27, 5], 0).repeat(40, 1)


def at(folder, **kwargs):
    return MaskArguments(dataset_name=str(folder), test_share=0.5, **kwargs)


def save_tiffs(target, image, mask, **options):
    """A folder of TIFF files, written with `options`, and of their masks, which are functions of a path."""
    target.mkdir()
    rows = []
    for i in range(4):
        tifffile.imwrite(target / f"{i}.tif", image, **options)
        mask(target / f"{i}_mask.tif")
        rows.append(json.dumps({"file_name": f"{i}.tif", "mask_file_name": f"{i}_mask.tif"}))
    (target / "metadata.jsonl").write_text("\n".join(rows))
    return target


def test_a_page_of_a_mask_is_not_lost_without_a_word(tmp_path):
    def pages(file):
        tifffile.imwrite(file, np.stack([IDS, 2 * IDS]), photometric="minisblack")

    with pytest.raises(
        ValueError,
        match=r"0_mask.tif\): the TIFF file has 2 pages, of which only the first would be read. Save the mask",
    ) as error:
        load_masks(at(save_tiffs(tmp_path / "pages", IDS, pages)))
    assert "num_channels" not in str(error.value)

    def thumbnail(file):
        with tifffile.TiffWriter(file) as tiff:
            tiff.write(IDS, photometric="minisblack")
            tiff.write(IDS[::2, ::2], photometric="minisblack", subfiletype=1)

    splits = load_masks(at(save_tiffs(tmp_path / "thumbnail", IDS, thumbnail)))
    assert all((read_mask(row["label"]) == IDS).all() for row in splits.train)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((5, 32, 40), {"photometric": "rgb", "planarconfig": "separate"}),
        ((5, 32, 40), {"photometric": "minisblack"}),
        ((32, 40, 5), {"photometric": "minisblack"}),
        ((32, 40, 5), {"photometric": "rgb", "planarconfig": "contig"}),
    ],
)
def test_tiffs_of_several_channels_have_the_size_that_they_are_read_with(tmp_path, shape, options):
    values = np.arange(np.prod(shape)).reshape(shape).astype("uint8")
    target = save_tiffs(tmp_path / "images", values, lambda file: tifffile.imwrite(file, IDS), **options)
    splits = load_masks(at(target, num_channels=5))
    expected = values if shape[-1] == 5 else np.moveaxis(values, 0, -1)
    assert all((row["image"] == expected).all() for row in splits.train)


@pytest.mark.parametrize("kind", ["int8", "int64", "float64", "uint32"])
def test_masks_of_every_type_that_tifffile_writes_are_read(tmp_path, kind):
    tifffile.imwrite(tmp_path / "mask.tif", IDS.astype(kind))
    assert (read_mask({"bytes": None, "path": str(tmp_path / "mask.tif")}) == IDS).all()


def test_a_mask_of_deep_colours_is_not_read_by_half(tmp_path):
    tifffile.imwrite(tmp_path / "mask.tif", np.repeat(IDS[..., None], 3, -1).astype("uint16"), photometric="rgb")
    with pytest.raises(ValueError, match=r"several channels of 16 bits \(mode RGB;16.\).*Save it with one channel"):
        read_mask({"bytes": None, "path": str(tmp_path / "mask.tif")})


def test_a_mask_of_several_planes_is_refused_with_its_shape(tmp_path):
    tifffile.imwrite(tmp_path / "mask.tif", np.stack([IDS] * 5), photometric="rgb", planarconfig="separate")
    with pytest.raises(ValueError, match=r"several channels \(its shape is \(5, 32, 40\)\).*Convert them to ids"):
        read_mask({"bytes": None, "path": str(tmp_path / "mask.tif")})
