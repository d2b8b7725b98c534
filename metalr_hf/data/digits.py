"""scikit-learn's handwritten digits: the default data of classification."""

from __future__ import annotations

import datasets
from PIL import Image
from sklearn.datasets import load_digits
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
    digits = load_digits()
    images = [
        Image.fromarray((image / 16 * 255).astype("uint8")).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
        for image in digits.images
    ]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(name) for name in digits.target_names])
    )
    rows = train_test_split(range(len(images)), test_size=TEST_SIZE, stratify=digits.target, random_state=seed)
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {"image": [images[i] for i in part], "label": [int(digits.target[i]) for i in part]}, features=features
            )
            for name, part in zip(("train", "test"), rows, strict=True)
        }
    )
