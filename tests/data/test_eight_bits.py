"""What 8 bits hold comes through bit for bit; no image loses its content without a word."""

import datasets
import numpy as np
import pytest
from deep_colours import COLOURS, GREYS, save_deep_colours
from digits import save_image_folder
from PIL import Image

from metalr_hf.data.eight_bits import fits_8_bits, to_rgb
from metalr_hf.data.intensity import to_input
from metalr_hf.data.loading import DataArguments, load_images
from metalr_hf.data.transforms import ImageTransform
from metalr_hf.models.demo import demo_image_processor

pytestmark = pytest.mark.usefixtures("offline")

SHAPE = np.zeros((16, 16), "uint8")
SHAPE[4:9, 4:9] = 255
NOTHING = np.zeros_like(SHAPE)


def shown(array):
    return Image.fromarray(array)


LOST = {
    "alpha.png": (shown(np.stack([NOTHING] * 3 + [SHAPE], -1)), r"one colour only, \(0, 0, 0\), .*\(mode RGBA\)"),
    "grey_alpha.png": (shown(np.stack([NOTHING, SHAPE], -1)), r"one colour only.*transparency \(mode LA\)"),
}
# These need a window of intensities, which a stream cannot tell.
DEEP = {
    "uint16.png": (shown(GREYS.astype("uint16") * 16), r"from 0 to 4080 \(uint16\), which 8 bits do not hold"),
    "uint16.tif": (shown(GREYS.astype("uint16") * 257), r"from 0 to 65535 \(uint16\)"),
    "int32.tif": (shown(GREYS.astype("int32") - 1024), r"from -1024 to 0 \(int32\)"),
    "unit.tif": (shown((GREYS / 255).astype("float32")), r"from 0 to 1 with fractions \(float32\)"),
    "bits.tif": (shown((SHAPE / 255).astype("float32")), r"from 0 to 1 \(float32\)"),
    "float.tif": (shown(GREYS.astype("float32") * 3), r"from 0 to 765 .*\(float32\)"),
    "nan.tif": (shown(np.where(GREYS, GREYS * np.float32(0.3), np.float32("nan"))), r"with fractions \(float32\)"),
}
KEPT = {
    "grey.png": shown(GREYS),
    "colours.png": shown(COLOURS),
    "alpha.png": shown(np.dstack([COLOURS, GREYS])),
    "opaque.png": shown(np.dstack([np.stack([NOTHING] * 3, -1), NOTHING + 255])),
    "bits.png": shown(SHAPE > 0),
    "palette.png": shown(COLOURS).quantize(),
    "photo.jpg": shown(COLOURS),
    "print.jpg": shown(COLOURS).convert("CMYK"),
    "uint16.png": shown(GREYS.astype("uint16")),
    "int32.tif": shown(GREYS.astype("int32")),
    "float.tif": shown(GREYS.astype("float32")),
}


def with_one_more(folder, name, image):
    save_image_folder(folder)
    file = folder / "train" / "one" / f"a_{name}"
    image.save(file)
    return file


@pytest.mark.parametrize("name", LOST)
def test_an_image_that_would_lose_its_content_is_refused_with_file_and_mode(tmp_path, name):
    image, message = LOST[name]
    file = with_one_more(tmp_path, name, image)
    with pytest.raises(ValueError, match=rf"Split 'train', row \d+ \({file}\): the image has .*{message}"):
        load_images(DataArguments(dataset_name=str(tmp_path)))
    # What a stream reads is looked at as it comes.
    transform = ImageTransform(demo_image_processor(), "crop_flip")
    with pytest.raises(ValueError, match=message):
        transform({"image": [Image.open(file)], "label": [0]})


@pytest.mark.parametrize("name", DEEP)
def test_an_image_of_more_bits_gets_a_window_and_a_stream_without_one_is_refused(tmp_path, name):
    image, message = DEEP[name]
    file = with_one_more(tmp_path, name, image)
    assert load_images(DataArguments(dataset_name=str(tmp_path))).window.source == "training images"
    transform = ImageTransform(demo_image_processor(), "crop_flip")
    with pytest.raises(ValueError, match=message + ".*--intensity_window LOW HIGH"):
        transform({"image": [Image.open(file)], "label": [0]})
    stream = load_images(DataArguments(dataset_name=str(tmp_path), streaming=True)).train.map(transform, batched=True)
    with pytest.raises(ValueError, match=message):
        next(iter(stream))


@pytest.mark.parametrize("name", KEPT)
def test_what_8_bits_hold_comes_through_bit_for_bit(tmp_path, name):
    file = with_one_more(tmp_path, name, KEPT[name])
    splits = load_images(DataArguments(dataset_name=str(tmp_path)))
    assert splits.window is None
    paths = [row["image"]["path"] for row in splits.train.cast_column("image", datasets.Image(decode=False))]
    image = splits.train[paths.index(str(file))]["image"]
    given = to_input(image)
    assert given.tobytes() == Image.open(file).convert("RGB").tobytes()
    if np.asarray(KEPT[name]).dtype != bool and KEPT[name].mode not in ("RGB", "RGBA", "CMYK", "P"):
        assert (np.asarray(given) == GREYS[..., None]).all()


def test_colours_of_16_bits_are_refused_in_png_and_read_in_tiff(tmp_path):
    file = with_one_more(tmp_path, "deep.png", Image.new("L", (4, 4)))
    values = save_deep_colours(file)
    message = r"the image has 16 bits a channel \(mode RGB;16B\), of which"
    with pytest.raises(ValueError, match=rf"\({file}\): {message} .*Save it as TIFF"):
        load_images(DataArguments(dataset_name=str(tmp_path)))
    stream = load_images(DataArguments(dataset_name=str(tmp_path), streaming=True)).train
    with pytest.raises(ValueError, match=message):
        list(stream)
    with Image.open(file) as image, pytest.raises(ValueError, match="Pillow keeps the upper half"):
        to_rgb(image)
    file.unlink()
    save_deep_colours(file.with_suffix(".tif"))
    splits = load_images(DataArguments(dataset_name=str(tmp_path)))
    deep = [row["image"] for row in splits.train if isinstance(row["image"], np.ndarray)]
    assert len(deep) == 1
    assert (deep[0] == values).all()
    assert splits.window.high > 255


def test_only_whole_numbers_of_a_byte_fit():
    for values in ([-1], [256], [0.5], [0.0, 1.0], [float("nan")], [float("inf")], [2**40]):
        assert not fits_8_bits(np.array(values))
