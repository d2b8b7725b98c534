"""scikit-learn's handwritten digits: the default data of classification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
from PIL import Image
from sklearn.model_selection import train_test_split

TEST_SIZE = 797


def demo_dataset(seed: int = 0) -> datasets.DatasetDict:
    """scikit-learn's handwritten digits: 1,000 to train on and 797 to test.

    Args:
        seed (`int`, *optional*, defaults to 0): Of the split, which is stratified by class.

    Returns:
        `datasets.DatasetDict`: `train` and `test`, with `image` (RGB, 32 × 32 pixels) and `label`.

    Example:

    ```python
    >>> from metalr_hf.data.digits import demo_dataset
    >>> demo_dataset().num_rows
    {'train': 1000, 'test': 797}

    ```
    """
    names = [str(digit) for digit in range(10)]
    return _divided(datasets.ClassLabel(names=names), lambda digit, image: digit, seed)


def demo_label_sets(seed: int = 0) -> datasets.DatasetDict:
    """scikit-learn's handwritten digits with several labels each: even, above four, with a loop.

    Args:
        seed (`int`, *optional*, defaults to 0): Of the split, which is stratified by digit.

    Returns:
        `datasets.DatasetDict`: `train` and `test`, with `image` (RGB, 32 × 32 pixels) and `label`, a list.

    Example:

    ```python
    >>> from metalr_hf.data.digits import demo_label_sets
    >>> rows = demo_label_sets()["test"]
    >>> rows.features["label"].feature.int2str(rows[4]["label"])
    ['even', 'with a loop']

    ```
    """
    names = ["even", "above four", "with a loop"]
    return _divided(
        datasets.List(datasets.ClassLabel(names=names)),
        lambda digit, image: [k for k, has in enumerate((digit % 2 == 0, digit > 4, digit in (0, 6, 8, 9))) if has],
        seed,
    )


def demo_quantities(seed: int = 0) -> datasets.DatasetDict:
    """scikit-learn's handwritten digits, and how much of each image is ink, in per cent.

    Args:
        seed (`int`, *optional*, defaults to 0): Of the split, which is stratified by digit.

    Returns:
        `datasets.DatasetDict`: `train` and `test`, with `image` (RGB, 32 × 32 pixels) and `ink`.

    Example:

    ```python
    >>> from metalr_hf.data.digits import demo_quantities
    >>> round(demo_quantities()["train"][0]["ink"], 1)
    35.7

    ```
    """
    rows = _divided(datasets.Value("float32"), lambda digit, image: float(image.mean() / 16 * 100), seed)
    return rows.rename_column("label", "ink")


def _divided(kind: Any, label_of: Callable[[int, Any], Any], seed: int) -> datasets.DatasetDict:
    # A second that importing the package need not take.
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [
        Image.fromarray((image / 16 * 255).astype("uint8")).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
        for image in digits.images
    ]
    labels = [label_of(int(digit), image) for digit, image in zip(digits.target, digits.images, strict=True)]
    features = datasets.Features(image=datasets.Image(), label=kind)
    rows = train_test_split(range(len(images)), test_size=TEST_SIZE, stratify=digits.target, random_state=seed)
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {"image": [images[i] for i in part], "label": [labels[i] for i in part]}, features=features
            )
            for name, part in zip(("train", "test"), rows, strict=True)
        }
    )
