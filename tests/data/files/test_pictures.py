import io

import numpy as np
import pytest
import tifffile
from deep_colours import COLOURS, GREYS
from PIL import Image

from metalr_hf.data.files import UnusableFileError, look_at, read_image


def saved(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return {"bytes": file.getvalue(), "path": None}


def as_npy(values):
    file = io.BytesIO()
    np.save(file, values)
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("kind", ["uint16", "int16", "uint32", "int32", "float32", "float64"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_grey_tiff_of_every_type_keeps_every_level(kind, compression):
    values = GREYS.astype(kind) * 100 + (2**31 if kind == "uint32" else 0)
    entry = saved(values, compression=compression, photometric="minisblack")
    assert (read_image(entry) == values).all()
    assert look_at(entry) == (True, 1, False)


@pytest.mark.parametrize("kind", ["uint16", "int16", "float32"])
def test_colour_tiff_keeps_every_level(kind):
    values = COLOURS.astype(kind) * 100
    entry = saved(values, photometric="rgb")
    assert (read_image(entry) == values).all()
    assert look_at(entry) == (True, 3, False)


@pytest.mark.parametrize("options", [{"planarconfig": "contig"}, {}])
def test_several_channels_are_read_from_tiff(options):
    values = np.stack([GREYS.astype("uint16") * (i + 1) for i in range(5)], -1)
    stored = values if options else np.moveaxis(values, -1, 0)
    entry = saved(stored, photometric="minisblack", **options)
    assert (read_image(entry, channels=5) == values).all()
    assert look_at(entry, channels=5) == (True, 5, False)


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_pages_of_a_tiff_are_not_dropped_without_a_word(kind):
    stack = saved(np.stack([GREYS.astype(kind) * i for i in range(3)]), photometric="minisblack")
    for read in (read_image, look_at):
        with pytest.raises(UnusableFileError, match="3 pages, of which only the first would be read.*num_channels=3"):
            read(stack)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as tiff:
        tiff.write(GREYS.astype(kind), photometric="minisblack")
        tiff.write(GREYS[::2, ::2].astype(kind), photometric="minisblack", subfiletype=1)
    with_thumbnail = {"bytes": file.getvalue(), "path": None}
    assert (np.asarray(read_image(with_thumbnail)) == GREYS).all()
    assert look_at(with_thumbnail) == (kind == "uint16", 1, False)


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 1), (1, 16, 16), (16, 16, 5), (5, 16, 16), (3, 16, 16)])
def test_arrays_come_with_the_channels_last(shape):
    values = np.arange(np.prod(shape)).reshape(shape).astype("uint16")
    read = read_image(as_npy(values), channels=5)
    if 5 in shape or 3 in shape:
        assert (read == (values if shape[-1] == 5 else np.moveaxis(values, 0, -1))).all()
    else:
        assert (read == values.reshape(16, 16)).all()


def test_arrays_of_bytes_are_images_and_others_are_refused():
    assert read_image(as_npy(COLOURS)).mode == "RGB"
    assert read_image(as_npy(GREYS > 7)).getextrema() == (0, 255)
    for values, message in (
        (np.zeros((2, 3, 4, 5)), r"shape \(2, 3, 4, 5\)"),
        (np.zeros((0, 4)), r"shape \(0, 4\)"),
        (np.zeros((4, 4), complex), "type complex128, not numbers"),
        (np.array([["a"]]), "not numbers"),
    ):
        with pytest.raises(UnusableFileError, match=message):
            look_at(as_npy(values))
    file = io.BytesIO()
    np.save(file, np.array([{}], object), allow_pickle=True)
    with pytest.raises(UnusableFileError, match="no array of numbers"):
        read_image({"bytes": file.getvalue(), "path": None})


def test_photographs_are_those_of_datasets(tmp_path):
    import datasets

    photo = Image.fromarray(COLOURS)
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "a.jpg", exif=exif)
    entry = {"bytes": None, "path": str(tmp_path / "a.jpg")}
    assert read_image(entry).tobytes() == datasets.Image().decode_example(entry).tobytes()
    assert look_at(entry) == (False, 3, False)


def test_without_the_extra_the_error_names_it(monkeypatch, tmp_path):
    from scans import save_dicom, save_nifti

    scans = {
        "pydicom": save_dicom(tmp_path / "a.dcm", GREYS),
        "nibabel": save_nifti(tmp_path / "a.nii", GREYS),
    }
    for package, file in scans.items():
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(ImportError, match=rf'{package}: pip install "metalr-hf\[medical\]"'):
            look_at({"bytes": None, "path": str(file)})
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(ImportError, match=r"tifffile: pip install"):
        read_image(saved(COLOURS.astype("uint16"), photometric="rgb"))
