from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scans import pydicom_file, save_dicom, save_dicom_folder, save_nifti
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    SegformerImageProcessor,
    ViTImageProcessor,
)

from metalr_hf.data.intensity import IntensityWindow, parse_window, processed, set_window, to_input, window_of
from metalr_hf.data.loading import DataArguments, load_images
from metalr_hf.data.transforms import ImageTransform, prepare_images
from metalr_hf.models.demo import demo_image_processor

pytestmark = pytest.mark.usefixtures("offline")

WINDOW = IntensityWindow(-160.0, 240.0, "given")


def columns(images, labels=None, feature=None):
    labels = labels or [i % 2 for i in range(len(images))]
    return datasets.Dataset.from_dict({"image": images, "label": labels}).cast_column(
        "label", datasets.ClassLabel(names=["a", "b"])
    )


def saved(rows, folder):
    datasets.DatasetDict(rows).save_to_disk(str(folder))
    return str(folder)


@pytest.mark.parametrize(
    "processor",
    [
        BitImageProcessor(),
        ViTImageProcessor(),
        SegformerImageProcessor(),
        CLIPImageProcessor(),
        ConvNextImageProcessor(),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_neighbouring_levels_stay_apart_and_the_saved_processor_knows_the_window(tmp_path, processor):
    set_window(processor, IntensityWindow(0.0, 65535.0, "training images"))
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert window_of(again) == IntensityWindow(0.0, 65535.0, "training images")
    levels = [processed(again, to_input(np.full((32, 32), 30000 + i, "uint16"), window_of(again))) for i in range(3)]
    assert levels[0].mean() < levels[1].mean() < levels[2].mean()
    # White and black are those of bytes.
    white = processed(again, to_input(np.full((32, 32), 65535, "uint16"), window_of(again)))
    assert white == pytest.approx(processed(again, Image.new("RGB", (32, 32), "white")), abs=1e-5)


def test_a_window_without_rounding():
    values = np.array([[-2000, -160, 40, 240, 3000]], "int16")
    shown = to_input(values, WINDOW)
    assert shown.shape == (3, 1, 5)
    assert shown[0, 0].tolist() == [0, 0, 127.5, 255, 255]
    assert to_input(np.array([[np.nan, np.inf, -np.inf]]), WINDOW)[0, 0].tolist() == [0, 255, 0]
    # 32 bits are more than float32 tells apart, before the window.
    far = np.array([[2**31, 2**31 + 1, 2**31 + 2]], "uint32")
    assert to_input(far, IntensityWindow(2.0**31, 2.0**31 + 2, "given"))[0, 0].tolist() == [0, 127.5, 255]


def test_bytes_go_through_no_window():
    photo = Image.fromarray(np.arange(64, dtype="uint8").reshape(8, 8))
    assert to_input(photo, WINDOW).tobytes() == photo.convert("RGB").tobytes()


def test_by_default_the_percentiles_of_the_training_images_and_of_no_other(tmp_path):
    train = [np.full((10, 10), 1000 + i, "uint16") for i in range(101)]
    test = [np.full((10, 10), 60000, "uint16"), np.full((10, 10), 0, "uint16")]
    folder = saved({"train": columns_of_images(train), "test": columns_of_images(test)}, tmp_path)
    splits = load_images(DataArguments(dataset_name=folder))
    assert splits.window == IntensityWindow(1000.0, 1100.0, "training images")
    assert splits.window.description == "1000 to 1100, 0.5th to 99.5th percentile of the training images"
    given = load_images(DataArguments(dataset_name=folder, intensity_window=[0, 4095])).window
    assert given.description == "0 to 4095, as given"
    processor = demo_image_processor()
    prepared = prepare_images(splits, processor, "none")
    assert prepared.test[0]["pixel_values"].numpy() == pytest.approx(1.0, abs=1e-5)
    assert prepared.test[1]["pixel_values"].numpy() == pytest.approx(-1.0, abs=1e-5)
    assert window_of(processor) == splits.window


def columns_of_images(arrays):
    return columns([datasets.Image().encode_example(array) for array in arrays]).cast_column("image", datasets.Image())


@pytest.mark.parametrize("augment", ["none", "flip", "crop", "crop_flip"])
def test_every_augmentation_has_the_scale_of_the_processor(augment):
    processor = demo_image_processor()
    set_window(processor, WINDOW)
    transform = ImageTransform(processor, augment)
    for value, expected in ((-160, -1.0), (40, 0.0), (240, 1.0)):
        rows = transform({"image": [np.full((40, 30), value, "int16")], "label": [0]})
        assert rows["pixel_values"][0].shape == (3, 64, 64)
        assert rows["pixel_values"][0] == pytest.approx(torch.full((3, 64, 64), expected), abs=1e-5)


def test_an_early_window_is_forgotten_by_images_of_8_bits():
    processor = demo_image_processor()
    set_window(processor, WINDOW)
    set_window(processor, None)
    assert window_of(processor) is None


@pytest.mark.parametrize("given", [["5"], ["9", "3"], ["a", "b"], ["1", "2", "3"], ["nan", "3"], ["0", "inf"]])
def test_what_is_no_window_is_refused(given):
    with pytest.raises(ValueError, match="intensity_window='.*is no window: give two numbers, the lower one first"):
        DataArguments(intensity_window=given)


def test_the_window_of_each_file(tmp_path):
    values = np.arange(256, dtype="uint16").reshape(16, 16) * 16
    for i in range(8):
        (tmp_path / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        save_dicom(tmp_path / "train" / "ab"[i % 2] / f"{i}.dcm", values, WindowCenter=400 * (i + 1), WindowWidth=400)
    splits = load_images(DataArguments(dataset_name=str(tmp_path), intensity_window=["voi"], test_share=0.25))
    assert splits.window.description == "the window (VOI) of each DICOM file"
    images = [row["image"] for row in splits.train]
    assert {(image.min(), image.max()) for image in images} == {(0.0, 255.0)}
    assert len({image.tobytes() for image in images}) == len(images)
    assert parse_window(["VOI"]) == splits.window
    np.save(tmp_path / "train" / "a" / "x.npy", values)
    with pytest.raises(ValueError, match=r"x.npy\): intensity_window='voi': only DICOM files have a window"):
        load_images(DataArguments(dataset_name=str(tmp_path), intensity_window=["voi"], test_share=0.25))


@pytest.mark.parametrize(
    ("kind", "tags", "given", "source"),
    [
        ("uint8", {"PixelPaddingValue": 255}, None, None),
        ("uint8", {"WindowCenter": 100, "WindowWidth": 50, "PixelPaddingValue": 255}, ["voi"], "voi"),
        ("uint8", {}, ["voi"], None),
        ("int8", {}, None, "training images"),
    ],
)
@pytest.mark.filterwarnings("ignore:intensity_window makes no difference")
def test_dicom_of_8_bits_that_passes_the_check_can_be_trained_on(tmp_path, kind, tags, given, source):
    values = np.arange(256).reshape(16, 16).astype("uint8").view(kind)
    for i in range(4):
        (tmp_path / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        save_dicom(tmp_path / "train" / "ab"[i % 2] / f"{i}.dcm", values, **tags)
    splits = load_images(DataArguments(dataset_name=str(tmp_path), intensity_window=given, test_share=0.5))
    assert getattr(splits.window, "source", None) == source
    pixels = prepare_images(splits, demo_image_processor(), "none").train[0]["pixel_values"]
    assert pixels.isfinite().all()
    assert pixels.std() > 0


def test_columns_of_nifti_of_paths_and_of_bytes_are_read(tmp_path):
    values = (np.arange(30, dtype="int16").reshape(5, 6) - 10) * 100
    files = [str(save_nifti(tmp_path / f"{i}.nii.gz", values + i)) for i in range(8)]
    for i, images in enumerate((files, [Path(file).read_bytes() for file in files])):
        rows = columns(images)
        folder = saved({"train": rows}, tmp_path / f"set{i}")
        args = DataArguments(dataset_name=folder, image_column_name="image", test_share=0.25)
        if i == 0:
            # `datasets` has a type of its own for them.
            rows = rows.cast_column("image", datasets.Nifti()).rename_column("image", "scan")
            folder = saved({"train": rows}, tmp_path / "nifti")
            args = DataArguments(dataset_name=folder, test_share=0.25)
        splits = load_images(args)
        assert splits.train[0]["image"].shape == (6, 5)
        assert splits.window.low < -900


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("frames.dcm", "has 2 frames. Save those to learn from as files of one frame each"),
        ("report.dcm", "has no pixels"),
        ("volume.nii.gz", "is a volume of the shape"),
        ("five.npy", "has 5 channels, and the model takes 3. Train with --num_channels 5"),
    ],
)
def test_what_cannot_be_learned_from_is_named_before_training(tmp_path, name, message):
    save_dicom_folder(tmp_path, train=6, test=4)
    file = tmp_path / "train" / "left" / name
    if name == "frames.dcm":
        save_dicom(file, np.zeros((8, 4), "uint16"), NumberOfFrames=2, Rows=4)
    elif name == "report.dcm":
        file.write_bytes(Path(pydicom_file("reportsi.dcm")).read_bytes())
    elif name == "volume.nii.gz":
        save_nifti(file, np.zeros((3, 4, 5)))
    else:
        np.save(file, np.zeros((9, 8, 5), "uint16"))
    with pytest.raises(ValueError, match=rf"Split 'train', row \d+ \({file}\): the .*{message}"):
        load_images(DataArguments(dataset_name=str(tmp_path)))


def test_a_training_set_that_tells_no_window_is_refused(tmp_path):
    flat = [np.full((4, 4), 1000, "uint16")] * 4
    shades = [np.full((4, 4), 10 * i, "uint8") for i in range(4)]
    folder = saved({"train": columns_of_images(flat), "test": columns_of_images(flat)}, tmp_path / "a")
    with pytest.raises(ValueError, match="all pixels of the training images are 1000"):
        load_images(DataArguments(dataset_name=folder))
    folder = saved({"train": columns_of_images(shades), "test": columns_of_images(flat)}, tmp_path / "b")
    with pytest.raises(ValueError, match="those to train on do not, .*Give one for all images with --intensity_window"):
        load_images(DataArguments(dataset_name=folder))


def test_a_processor_that_rounds_is_refused():
    class Rounds(BitImageProcessor):
        def preprocess(self, images, **kwargs):
            if isinstance(images, torch.Tensor) and images.is_floating_point():
                raise ValueError("bytes only")
            return super().preprocess(images, **kwargs)

    with pytest.raises(ValueError, match="Rounds takes images of 8 bits only, and these have more"):
        set_window(Rounds(), WINDOW)


@pytest.mark.parametrize(
    ("image", "channels", "shape"),
    [
        (Image.new("L", (6, 4)), 1, (1, 4, 6)),
        (Image.new("RGB", (6, 4)), 1, (1, 4, 6)),
        (Image.new("1", (6, 4)), 1, (1, 4, 6)),
        (Image.new("P", (6, 4)), 1, (1, 4, 6)),
        (Image.new("RGBA", (6, 4)), 4, (4, 4, 6)),
        (Image.new("L", (6, 4)), 4, (4, 4, 6)),
        (np.zeros((4, 6, 5), "uint8"), 5, (5, 4, 6)),
        (np.zeros((4, 6), "uint8"), 2, (2, 4, 6)),
    ],
)
def test_images_come_with_as_many_channels_as_the_model_takes(image, channels, shape):
    pixels = to_input(image, None, channels)
    assert pixels.shape == shape
    assert pixels.dtype == torch.uint8


def test_other_channels_than_the_model_takes_are_refused():
    with pytest.raises(ValueError, match="has 5 channels, and the model takes 3. Train with --num_channels 5"):
        to_input(np.zeros((4, 6, 5), "uint8"))
    with pytest.raises(ValueError, match="the image has 3 channels, and the model takes 4"):
        to_input(Image.new("RGB", (6, 4)), None, 4)


def test_a_window_that_changes_nothing_is_told_of(tmp_path):
    shades = [np.full((4, 4), 10 * i, "uint8") for i in range(10)]
    folder = saved({"train": columns_of_images(shades), "test": columns_of_images(shades)}, tmp_path)
    with pytest.warns(UserWarning, match="intensity_window makes no difference: all images have 8 bits"):
        splits = load_images(DataArguments(dataset_name=folder, intensity_window=["0", "100"]))
    assert splits.window is None


def test_deep_images_of_a_model_without_a_window_come_with_advice_that_can_be_followed():
    with pytest.raises(
        ValueError, match="Train with one, as with --intensity_window LOW HIGH, or, .*save these with 8"
    ):
        to_input(np.full((4, 4), 1000, "uint16"))


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), "uint8"))


def image_folder(folder):
    for i in range(20):
        file = folder / "ab"[i % 2] / f"{i}.{('png', 'jpg')[i // 10]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(i).save(file)
    return folder


def test_files_that_are_broken_are_named_before_training_all_at_once(tmp_path):
    image_folder(tmp_path)
    short = [tmp_path / "a" / "4.png", tmp_path / "b" / "15.jpg"]
    for file in short:
        file.write_bytes(file.read_bytes()[:-300])
    (tmp_path / "b" / "19.jpg").write_bytes(b"")
    with pytest.raises(
        ValueError, match="^3 of the images cannot be read: Split 'train', row .* Repair these"
    ) as error:
        load_images(DataArguments(dataset_name=str(tmp_path)))
    for file in (*short, tmp_path / "b" / "19.jpg"):
        assert f"({file}): " in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_camera_writes_behind_an_image_does_not_break_it(tmp_path):
    image_folder(tmp_path)
    for length, file in zip((10, 5000), sorted(tmp_path.rglob("*.jpg")), strict=False):
        file.write_bytes(file.read_bytes() + b"x" * length)
    assert len(load_images(DataArguments(dataset_name=str(tmp_path))).train) == 16
