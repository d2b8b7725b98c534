import numpy as np

from metalr_hf.data.digits import demo_dataset


def test_the_digits_are_stratified_disjoint_and_the_same_each_time():
    first, again, other = demo_dataset(), demo_dataset(), demo_dataset(seed=1)
    assert first.num_rows == {"train": 1000, "test": 797}
    assert first["train"]["label"] == again["train"]["label"]
    assert first["train"]["label"] != other["train"]["label"]
    counts = np.bincount(first["train"]["label"])
    assert counts.min() >= 96
    assert counts.max() <= 104
    image = first["train"][0]["image"]
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert first["test"].features["label"].names == [str(i) for i in range(10)]
