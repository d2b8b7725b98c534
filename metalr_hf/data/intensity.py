"""Images of more than 8 bits to what an image processor takes: one window of intensities for a whole data set."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor

from ..messages import first_line
from .columns import IMAGE, place
from .eight_bits import fits_8_bits, refuse_hidden_content, to_rgb
from .files import UnusableFileError, look_at, read_image
from .files.contents import BrokenFileError
from .files.pictures import DEEP_MODES
from .files.reading import may_be_cut_short

VOI = "voi"
PERCENTILES = (0.5, 99.5)
# So many images, evenly over the training split, and pixels of each tell the percentiles.
IMAGES_LOOKED_AT = 1000
PIXELS_LOOKED_AT = 10_000
WHITE = 255.0
CHANNELS = 3
BROKEN_NAMED = 10
ADVICE = "Give one for all images with --intensity_window LOW HIGH"


@dataclass(frozen=True)
class IntensityWindow:
    """The intensities that become black and white; those between keep all their levels.

    Args:
        low (`float`, *optional*): What becomes black, with everything below.
        high (`float`, *optional*): What becomes white, with everything above.
        source (`str`):
            Where the two come from: `"given"`, `"training images"`, or `"voi"`: from each DICOM file, and there are
            no two numbers for all.

    Example:

    ```python
    >>> import numpy as np
    >>> from metalr_hf.data.intensity import IntensityWindow
    >>> IntensityWindow(-160.0, 240.0, "given").shown(np.array([-1000, 40, 240])).tolist()
    [0.0, 127.5, 255.0]

    ```
    """

    low: float | None
    high: float | None
    source: str

    def shown(self, values: np.ndarray) -> np.ndarray:
        """Brings intensities to 0 to 255, without rounding.

        Args:
            values (`numpy.ndarray`): Of any real type. What is no number (NaN) becomes black.

        Returns:
            `numpy.ndarray`, float32
        """
        if self.low is None or self.high is None:
            # Each file has gone through its own window when it was read.
            return np.nan_to_num(values).astype(np.float32)
        share = (values.astype(np.float64) - self.low) / (self.high - self.low)
        return (np.nan_to_num(share.clip(0, 1)) * WHITE).astype(np.float32)

    @property
    def description(self) -> str:
        """What the model card says of it."""
        if self.source == VOI:
            return "the window (VOI) of each DICOM file"
        source = f"{PERCENTILES[0]:g}th to {PERCENTILES[1]:g}th percentile of the training images"
        return f"{self.low:.6g} to {self.high:.6g}, {'as given' if self.source == 'given' else source}"


def parse_window(given: Sequence[Any] | None) -> IntensityWindow | None:
    """Reads the argument `intensity_window`.

    Args:
        given (`Sequence`, *optional*): Two numbers, or `"voi"` alone.

    Returns:
        [`IntensityWindow`], *optional*

    Raises:
        ValueError: if it is something else.

    Example:

    ```python
    >>> from metalr_hf.data.intensity import parse_window
    >>> parse_window(["-160", "240"])
    IntensityWindow(low=-160.0, high=240.0, source='given')

    ```
    """
    if not given:
        return None
    if [str(part).lower() for part in given] == [VOI]:
        return IntensityWindow(None, None, VOI)
    try:
        low, high = map(float, given)
    except ValueError:
        low = high = 0.0
    if not (low < high and np.isfinite([low, high]).all()):
        shown = " ".join(map(str, given))
        raise ValueError(
            f"intensity_window={shown!r} is no window: give two numbers, the lower one first, as in --intensity_window "
            "-160 240, or voi for the window that each DICOM file holds."
        )
    return IntensityWindow(low, high, "given")


def window_of(processor: BaseImageProcessor) -> IntensityWindow | None:
    """The window that an image processor was saved with.

    Args:
        processor (`transformers.BaseImageProcessor`): An image processor.

    Returns:
        [`IntensityWindow`], *optional*: `None` if it is for images of 8 bits.
    """
    saved = getattr(processor, "intensity_window", None)
    return IntensityWindow(**saved) if saved else None


def channels_of(processor: BaseImageProcessor) -> int:
    """How many channels the images of an image processor have.

    Args:
        processor (`transformers.BaseImageProcessor`): An image processor.

    Returns:
        `int`: 3 unless it was made for another number.
    """
    return int(getattr(processor, "num_channels", None) or CHANNELS)


def set_window(processor: BaseImageProcessor, window: IntensityWindow | None) -> None:
    """Writes a window into an image processor, whose saved configuration then has it.

    Args:
        processor (`transformers.BaseImageProcessor`): The model's image processor.
        window ([`IntensityWindow`], *optional*): The window.

    Raises:
        ValueError: if the processor rounds what is between two of 256 levels.
    """
    given: Any = processor
    if window is None:
        # One of an earlier run, in which images had more bits.
        if getattr(processor, "intensity_window", None):
            given.intensity_window = None
        return
    ramp = torch.linspace(0, WHITE, 64 * 64).reshape(1, 64, 64).repeat(channels_of(processor), 1, 1)
    try:
        levels = processed(processor, ramp)
        rounded = processed(processor, ramp.to(torch.uint8))
        close = bool((levels - rounded).abs().max() <= 0.1 * (rounded.max() - rounded.min()))
    except (ValueError, TypeError, RuntimeError):
        close = False
    if not close:
        raise ValueError(
            f"{type(processor).__name__} takes images of 8 bits only, and these have more. Choose a model whose image "
            "processor works on tensors, or save the images with 8 bits."
        )
    given.intensity_window = asdict(window)


def processed(processor: BaseImageProcessor, image: Image.Image | torch.Tensor, **given: Any) -> Any:
    """What an image processor makes of an image.

    Args:
        processor (`transformers.BaseImageProcessor`): The image processor.
        image (`PIL.Image.Image` or `torch.Tensor` of shape `(channels, height, width)`): As [`to_input`] gives it.
        **given: To the processor. With any, all that it returns is returned.

    Returns:
        `torch.Tensor` of shape `(channels, height, width)`
    """
    if isinstance(image, torch.Tensor):
        given = {**given, "input_data_format": "channels_first"}
    return processor(image, return_tensors="pt", **given)["pixel_values"][0]


def to_input(image: Any, window: IntensityWindow | None = None, channels: int = CHANNELS) -> Image.Image | torch.Tensor:
    """An image in the form that an image processor takes.

    Args:
        image (`PIL.Image.Image` or `numpy.ndarray`): As [`~metalr_hf.data.files.read_image`] gives it.
        window ([`IntensityWindow`], *optional*): For images of more than 8 bits.
        channels (`int`, *optional*, defaults to 3): How many channels the model takes. Grey images are repeated.

    Returns:
        `PIL.Image.Image` of mode `RGB`, or `torch.Tensor` of shape `(channels, height, width)`: floats from 0 to 255 of
            an image of more than 8 bits, else bytes where they are not three.

    Raises:
        ValueError: if 8 bits do not hold the image and there is no window, or it has another number of channels.

    Example:

    ```python
    >>> import numpy as np
    >>> from metalr_hf.data.intensity import IntensityWindow, to_input
    >>> to_input(np.full((4, 6), 1024, "uint16"), IntensityWindow(0.0, 4096.0, "given")).unique()
    tensor([63.7500])

    ```
    """
    if isinstance(image, Image.Image) and image.mode not in DEEP_MODES:
        refuse_hidden_content(image)
        if channels == CHANNELS:
            return to_rgb(image)
        bands = len(image.getbands())
        if image.mode in ("1", "P") or (channels == 1 and bands != 1):
            image = image.convert("L" if channels == 1 else "RGB")
        values = np.asarray(image)
    else:
        values = np.asarray(image)
        if values.dtype != np.uint8:
            if window is not None:
                values = window.shown(values)
            else:
                values = _as_8_bits(values)
                if channels == CHANNELS and values.ndim == 2:
                    return Image.fromarray(values).convert("RGB")
    values = values[..., None] if values.ndim == 2 else values
    found = values.shape[-1]
    if found not in (1, channels):
        raise ValueError(
            f"the image has {found} channels, and the model takes {channels}. Train with --num_channels {found}, or "
            f"save images of {channels}"
        )
    pixels = torch.from_numpy(np.array(np.moveaxis(values, -1, 0), order="C"))
    return pixels if found == channels else pixels.repeat(channels, 1, 1)


def find_window(splits: Mapping[str, Any], train: Any, given: IntensityWindow | None, channels: int | None) -> Any:
    """Looks at the images of all splits, and finds the window of intensities if one is needed.

    Args:
        splits (`Mapping[str, datasets.Dataset]`): Name to rows with `image`.
        train (`datasets.Dataset`): The rows that are trained on, which tell the percentiles.
        given ([`IntensityWindow`], *optional*): The one that was given.
        channels (`int`, *optional*): How many channels the model takes, if not three.

    Returns:
        [`IntensityWindow`], *optional*: `None` where all images are held by 8 bits.

    Raises:
        FileNotFoundError: if the file of an image is not there.
        ValueError: if an image cannot be learned from. It names split, row and file, of files that are broken all.
    """
    is_needed, broken = False, []
    for name, rows in splits.items():
        for row, entry in enumerate(_undecoded(rows)):
            where = place(f"Split {name!r}, row {row}", entry)
            try:
                is_needed |= check_image(where, entry, channels, given, is_needed)
            except BrokenFileError as error:
                broken.append(str(error))
    if broken:
        raise ValueError(
            f"{len(broken)} of the images cannot be read: {'; '.join(broken[:BROKEN_NAMED])}"
            f"{'; ...' if len(broken) > BROKEN_NAMED else ''}. Repair these files or leave them out."
        )
    if not is_needed:
        if given is not None:
            warnings.warn(
                "intensity_window makes no difference: all images have 8 bits, and a window is for images of more.",
                UserWarning,
                stacklevel=2,
            )
        return None
    if given is not None:
        return given
    low, high = _percentiles(train, channels)
    return IntensityWindow(low, high, "training images")


def check_image(
    where: str, entry: Any, channels: int | None, window: IntensityWindow | None, is_windowed: bool = False
) -> bool:
    """Looks at an image before training.

    Args:
        where (`str`): Which row, for the message.
        entry (`Mapping`, *optional*): `bytes` and `path` of its file.
        channels (`int`, *optional*): How many channels the model takes, if not three.
        window ([`IntensityWindow`], *optional*): The one that was given.
        is_windowed (`bool`, *optional*, defaults to `False`): Whether others need a window already.

    Returns:
        `bool`: whether it has more than 8 bits.

    Raises:
        FileNotFoundError: if there is no such file.
        BrokenFileError: if its header cannot be read, or it lacks its end.
        ValueError: if it cannot be learned from.
    """
    if entry is None:
        return False
    voi = window is not None and window.source == VOI
    try:
        contents = look_at(entry, channels)
        if contents.channels not in (1, 2, 3, 4, channels or CHANNELS):
            raise UnusableFileError(
                f"the image has {contents.channels} channels, and the model takes {channels or CHANNELS}. Train with "
                f"--num_channels {contents.channels}, or save images of {channels or CHANNELS}"
            )
        if not may_be_cut_short(entry):
            # A window of a file of 8 bits makes fractions of its values.
            if not contents.deep and not contents.transparent and not voi:
                return False
            if contents.deep and is_windowed and not voi:
                return True
        image = read_image(entry, voi=voi, channels=channels)
    except UnusableFileError as error:
        raise ValueError(f"{where}: {error}.") from error
    except ImportError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{where}: there is no such file. Correct its name where the data set lists it, as a metadata.csv does, or "
            "leave the row out."
        ) from error
    except Exception as error:
        # Of a disk or a network that fails, which have a number, the file is not to blame.
        if isinstance(error, OSError) and error.errno is not None:
            return False
        raise BrokenFileError(f"{where}: {first_line(error)}") from error
    try:
        if isinstance(image, np.ndarray) and image.dtype != np.uint8:
            return not (window is None and fits_8_bits(image))
        to_input(image, window, channels or CHANNELS)
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from error
    return False


def _as_8_bits(values: np.ndarray) -> np.ndarray:
    if fits_8_bits(values):
        return values.astype(np.uint8)
    numbers = values[np.isfinite(values)]
    low, high = (f"{value:.6g}" for value in (numbers.min(initial=0), numbers.max(initial=0)))
    kind = "" if (numbers == numbers.round()).all() else " with fractions"
    raise ValueError(
        f"the image has values from {low} to {high}{kind} ({values.dtype}), which 8 bits do not hold, and there is no "
        "window of intensities. Train with one, as with --intensity_window LOW HIGH, or, for a model that was trained "
        "on images of 8 bits, save these with 8 bits as well"
    )


def _undecoded(rows: Any) -> Any:
    column = rows.select_columns([IMAGE]).cast_column(IMAGE, datasets.Image(decode=False)).with_format(None)
    return (row[IMAGE] for row in column)


def _percentiles(train: Any, channels: int | None) -> tuple[float, float]:
    wanted = np.unique(np.linspace(0, len(train) - 1, min(len(train), IMAGES_LOOKED_AT)).round().astype(int))
    samples = []
    for entry in _undecoded(train.select(wanted)):
        try:
            image = read_image(entry, channels=channels)
        except Exception:
            continue
        if not isinstance(image, np.ndarray) or image.dtype == np.uint8:
            continue
        values = image.reshape(-1)
        values = values[np.isfinite(values)].astype(np.float64)
        samples.append(values[:: max(1, len(values) // PIXELS_LOOKED_AT)])
    pixels = np.concatenate(samples) if samples else np.zeros(0)
    if not len(pixels):
        raise ValueError(
            "intensity_window: the images to test on have more than 8 bits, those to train on do not, so that these "
            f"tell no window. {ADVICE}."
        )
    low, high = np.percentile(pixels, PERCENTILES)
    if not low < high:
        # Nearly all of it is background.
        low, high = pixels.min(), pixels.max()
    if not low < high:
        raise ValueError(
            f"intensity_window: all pixels of the training images are {low:.6g}, so that there is nothing to learn. "
            "Look at the images."
        )
    return float(low), float(high)
