"""No image loses its content without a word: what 8 bits hold comes through bit for bit, all else is refused."""

import datasets
import numpy as np
import pytest
from digits import save_image_folder
from PIL import Image

from metalr_hf.data.eight_bits import to_rgb
from metalr_hf.data.loading import DataArguments, load_images
from metalr_hf.data.transforms import ImageTransform
from metalr_hf.models.demo import demo_image_processor

pytestmark = pytest.mark.usefixtures("offline")

GREYS = np.arange(256, dtype="uint8").reshape(16, 16)
COLOURS = np.stack([GREYS, GREYS.T, 255 - GREYS], -1)
SHAPE = np.zeros((16, 16), "uint8")
SHAPE[4:9, 4:9] = 255
NOTHING = np.zeros_like(SHAPE)


def shown(array):
    return Image.fromarray(array)


LOST = {
    "uint16.png": (shown(GREYS.astype("uint16") * 16), r"from 0 to 4080 \(mode I;16\), which 8 bits do not hold"),
    "uint16.tif": (shown(GREYS.astype("uint16") * 257), r"from 0 to 65535 \(mode I;16\)"),
    "int32.tif": (shown(GREYS.astype("int32") - 1024), r"from -1024 to -769 \(mode I\)"),
    "unit.tif": (shown((GREYS / 255).astype("float32")), r"from 0 to 1 with fractions \(mode F\)"),
    "float.tif": (shown(GREYS.astype("float32") * 3), r"from 0 to 765 .*\(mode F\)"),
    "nan.tif": (shown(np.where(GREYS, np.float32(7), np.float32("nan"))), r"with fractions \(mode F\)"),
    "alpha.png": (shown(np.stack([NOTHING] * 3 + [SHAPE], -1)), r"one colour only, \(0, 0, 0\), .*\(mode RGBA\)"),
    "grey_alpha.png": (shown(np.stack([NOTHING, SHAPE], -1)), r"one colour only.*transparency \(mode LA\)"),
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


@pytest.mark.parametrize("name", KEPT)
def test_what_8_bits_hold_comes_through_bit_for_bit(tmp_path, name):
    file = with_one_more(tmp_path, name, KEPT[name])
    rows = load_images(DataArguments(dataset_name=str(tmp_path))).train
    paths = [row["image"]["path"] for row in rows.cast_column("image", datasets.Image(decode=False))]
    image = rows[paths.index(str(file))]["image"]
    assert to_rgb(image).tobytes() == Image.open(file).convert("RGB").tobytes()
    if np.asarray(KEPT[name]).dtype != bool and image.mode not in ("RGB", "RGBA", "CMYK", "P"):
        assert (np.asarray(to_rgb(image)) == GREYS[..., None]).all()


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_colours_of_16_bits_are_refused(tmp_path, ending):
    file = with_one_more(tmp_path, f"deep.{ending}", Image.new("L", (4, 4)))
    save_deep_colours(file)
    with pytest.raises(
        ValueError, match=r"\(.*/a_deep.*\): the image has 16 bits a channel \(mode RGB;16[BL]\), of which"
    ):
        load_images(DataArguments(dataset_name=str(tmp_path)))


def save_deep_colours(file):
    """Pillow reads such files, and does not write them."""
    import struct
    import zlib

    values = (COLOURS.astype("uint16") * 257) ^ 5
    if file.suffix == ".png":

        def chunk(kind, body):
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
        header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
        file.write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
        )
        return
    body = values.astype("<u2").tobytes()
    # Width, height, bits, no compression, colours, where the strip is, samples, rows a strip, bytes of it.
    bits_at, strip_at = 8 + 2 + 12 * 9 + 4, 8 + 2 + 12 * 9 + 4 + 6
    tags = [
        *((256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 3, bits_at), (259, 3, 1, 1), (262, 3, 1, 2)),
        *((273, 4, 1, strip_at), (277, 3, 1, 3), (278, 3, 1, 16), (279, 4, 1, len(body))),
    ]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    file.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<HHH", 16, 16, 16) + body)
