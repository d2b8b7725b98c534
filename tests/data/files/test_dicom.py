import io
import warnings

import numpy as np
import pydicom
import pytest
from scans import NAME, PRIVATE, pydicom_file, save_dicom

from metalr_hf.data.files import UnusableFileError, look_at, read_image
from metalr_hf.data.files.dicom import read_dicom, tag_of

VALUES = (np.arange(12 * 16).reshape(12, 16) * 20).astype("uint16")


def entry(file):
    return {"bytes": None, "path": str(file)}


def test_slope_and_intercept_give_hounsfield_units(tmp_path):
    file = save_dicom(tmp_path / "a.dcm", VALUES, RescaleSlope=2, RescaleIntercept=-1024)
    assert (read_image(entry(file)) == VALUES * 2.0 - 1024).all()
    assert look_at(entry(file)) == (True, 1, False)
    # Whatever the file is called, and if it is only bytes.
    assert (read_image({"bytes": file.read_bytes(), "path": None}) == VALUES * 2.0 - 1024).all()


def test_signed_values_keep_their_sign(tmp_path):
    signed = VALUES.astype("int16") - 1000
    assert (read_image(entry(save_dicom(tmp_path / "a.dcm", signed))) == signed).all()


@pytest.mark.parametrize("tags", [{}, {"RescaleSlope": 2, "RescaleIntercept": -1024}])
def test_images_in_which_high_values_are_dark_are_turned_alike(tmp_path, tags):
    bright = read_image(entry(save_dicom(tmp_path / "a.dcm", VALUES, BitsStored=12, **tags)))
    turned = {**tags, "PhotometricInterpretation": "MONOCHROME1"}
    dark = read_image(entry(save_dicom(tmp_path / "b.dcm", 4095 - VALUES, BitsStored=12, **turned)))
    assert (dark == bright).all()


def test_bytes_of_grey_and_colours_come_as_images(tmp_path):
    greys = VALUES.astype("uint8")
    colours = np.stack([greys, greys.T.reshape(greys.shape), 255 - greys], -1)
    for values in (greys, colours):
        file = save_dicom(tmp_path / "a.dcm", values)
        assert (np.asarray(read_image(entry(file))) == values).all()
        assert not look_at(entry(file)).deep
    dark = save_dicom(tmp_path / "b.dcm", greys, PhotometricInterpretation="MONOCHROME1")
    assert (np.asarray(read_image(entry(dark))) == 255 - greys).all()


def test_padding_is_no_value(tmp_path):
    file = save_dicom(tmp_path / "a.dcm", VALUES, PixelPaddingValue=0, RescaleSlope=1, RescaleIntercept=-1024)
    values = read_image(entry(file))
    assert np.isnan(values[VALUES == 0]).all()
    assert (values[VALUES != 0] == VALUES[VALUES != 0] - 1024.0).all()


@pytest.mark.parametrize("tags", [{}, {"RescaleSlope": 1, "RescaleIntercept": 0}])
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_of_bytes_is_black(tmp_path, kind, tags):
    greys = VALUES.astype("uint8")
    padded = save_dicom(
        tmp_path / "a.dcm",
        greys,
        PixelPaddingValue=200,
        PixelPaddingRangeLimit=255,
        PhotometricInterpretation=kind,
        **tags,
    )
    image = read_image(entry(padded))
    assert image.mode == "L"
    bright = 255 - greys if kind == "MONOCHROME1" else greys
    assert (np.asarray(image) == np.where(greys >= 200, 0, bright)).all()
    assert not look_at(entry(padded)).deep


def test_signed_bytes_are_no_grey_image(tmp_path):
    signed = (VALUES // 20 - 100).astype("int8")
    file = save_dicom(tmp_path / "a.dcm", signed)
    assert look_at(entry(file)).deep
    assert (read_image(entry(file)) == signed).all()


def test_the_window_of_a_file_shows_it_from_black_to_white(tmp_path):
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400}
    shown = read_image(entry(save_dicom(tmp_path / "a.dcm", VALUES, **tags)), voi=True)
    units = VALUES - 1024.0
    assert (shown[units <= -160] == 0).all()
    assert (shown[units >= 240] == 255).all()
    inside = (units > -150) & (units < 230)
    # The standard puts the ends half a unit inside of those.
    assert shown[inside] == pytest.approx((units[inside] + 160) / 400 * 255, abs=0.7)
    dark = read_image(
        entry(save_dicom(tmp_path / "b.dcm", VALUES, PhotometricInterpretation="MONOCHROME1", **tags)), voi=True
    )
    assert dark == pytest.approx(255 - shown)
    sigmoid = save_dicom(tmp_path / "c.dcm", VALUES, VOILUTFunction="SIGMOID", **tags)
    shown = read_image(entry(sigmoid), voi=True)
    assert shown.min() >= 0
    assert shown.max() == pytest.approx(255, abs=0.1)
    assert shown[np.abs(units - 40).argmin() // 16, np.abs(units - 40).argmin() % 16] == pytest.approx(127.5, abs=8)


def test_a_file_without_a_window_says_so(tmp_path):
    file = save_dicom(tmp_path / "a.dcm", VALUES)
    with pytest.raises(UnusableFileError, match="has no window of its own. Give one for all images"):
        read_image(entry(file), voi=True)
    assert (np.asarray(read_image(entry(save_dicom(tmp_path / "b.dcm", VALUES.astype("uint8"))), voi=True)) < 256).all()


def test_what_cannot_be_learned_from_is_refused_with_advice(tmp_path):
    frames = save_dicom(tmp_path / "a.dcm", np.zeros((8, 4), "uint16"), NumberOfFrames=2, Rows=4)
    report = save_dicom(tmp_path / "b.dcm", VALUES, PixelData=None)
    for file, message in (
        (frames, "has 2 frames. Save those"),
        (report, r"no pixels \(a report"),
    ):
        for read in (look_at, read_image):
            with pytest.raises(UnusableFileError, match=message):
                read(entry(file))
    for name in ("reportsi.dcm", "rtplan.dcm", "test-SR.dcm"):
        with pytest.raises(UnusableFileError, match="no pixels"):
            look_at(entry(pydicom_file(name)))


def test_a_codec_that_is_missing_is_named_before_decoding(tmp_path):
    dataset = pydicom.dcmread(pydicom_file("CT_small.dcm"))
    # No library decodes it.
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    content = io.BytesIO()
    dataset.PixelData = pydicom.encaps.encapsulate([dataset.PixelData])
    pydicom.dcmwrite(content, dataset, enforce_file_format=True)
    for read in (look_at, read_image):
        with pytest.raises(UnusableFileError, match=r"compressed as MPEG2.*codec is not installed. Install it"):
            read({"bytes": content.getvalue(), "path": None})


@pytest.mark.parametrize(
    "name",
    ["CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "image_dfl.dcm"],
)
def test_files_of_other_writers_are_read_without_warnings(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = pydicom_file(name)
        values = np.asarray(read_image(entry(file)))
        assert values.ndim == 2
        assert values.std() > 0
        assert look_at(entry(file)).deep == (values.dtype != np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(file, force=True)
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
        if "PixelPaddingValue" not in dataset:
            assert (values == dataset.pixel_array * slope + intercept).all()


@pytest.mark.parametrize("name", ["examples_palette.dcm", "examples_ybr_color.dcm", "SC_rgb_rle.dcm"])
def test_colours_of_every_kind_come_as_red_green_and_blue(name):
    file = pydicom_file(name)
    if (pydicom.dcmread(file).get("NumberOfFrames") or 1) > 1:
        with pytest.raises(UnusableFileError, match="frames"):
            read_image(entry(file))
        return
    assert look_at(entry(file)).channels == 3
    assert np.asarray(read_image(entry(file))).shape[-1] == 3


def test_nothing_of_the_patient_is_read(tmp_path, caplog):
    file = save_dicom(tmp_path / "a.dcm", VALUES, patient="P1")
    from metalr_hf.data.files import dicom

    with open(file, "rb") as opened:
        dataset = dicom._open(opened)
    text = str(dataset)
    assert NAME not in text
    assert PRIVATE not in text
    assert "P1" not in text
    assert tag_of(str(file), "PatientID") == "P1"
    assert tag_of(str(file), "StudyID") is None


def test_a_path_and_a_file_read_alike(tmp_path):
    file = save_dicom(tmp_path / "a.dcm", VALUES)
    with open(file, "rb") as opened:
        assert (read_dicom(opened) == read_dicom(str(file))).all()
