"""Classes of which some are rare: their weights, and what is said of them before training."""

import logging

import datasets
import numpy as np
import pytest
from digits import NAMES, digit_images

from metalr_hf.data.labels.imbalance import (
    ClassArguments,
    class_weights,
    label_weights,
    rare,
    warn_of_rare_classes,
    warn_of_rare_labels,
)

FEATURES = datasets.Features(label=datasets.ClassLabel(names=["healthy", "ill", "odd"]))


def rows(*counts):
    labels = [k for k, count in enumerate(counts) for _ in range(count)]
    return datasets.Dataset.from_dict({"label": labels}, features=FEATURES)


def test_balanced_classes_count_the_same_and_an_image_counts_one_on_average():
    counts = np.array([80, 15, 5])
    weights = np.array(class_weights(["balanced"], rows(*counts), FEATURES["label"].names))
    np.testing.assert_allclose(weights * counts, 100 / 3)
    given = np.array(class_weights([1.0, 2.0, 4.0], rows(*counts), FEATURES["label"].names))
    np.testing.assert_allclose(given / given[0], [1, 2, 4])
    assert (given * counts).sum() == pytest.approx(100)


def test_a_class_without_images_has_a_weight_that_is_finite():
    assert np.isfinite(class_weights(["balanced"], rows(80, 20, 0), FEATURES["label"].names)).all()


def test_labels_that_are_unknown_are_not_counted():
    figures = np.array([[1, 1], [0, -100], [0, -100], [0, 0]])
    assert label_weights(["balanced"], figures, ["a", "b"]) == [3.0, 1.0]


def test_a_label_that_no_image_is_known_to_be_without_still_counts_and_is_warned_of(caplog):
    figures = np.array([[1, 1], [1, 0], [-100, 1]])
    assert label_weights(["balanced"], figures, ["a", "b"]) == [1.0, 0.5]
    with caplog.at_level("WARNING"):
        warn_of_rare_labels(figures, ["a", "b"], None)
    assert "No training image is known to be without the label 'a', so" in caplog.text


@pytest.mark.parametrize("given", [["blanced"], ["1", "x"], ["0", "1"], ["-1", "2"], ["nan"], ["inf", "1"], [], "2"])
def test_what_is_no_weight_is_refused(given):
    if given == "2":
        given = 2
    with pytest.raises(ValueError, match="class_weights=.* must be `balanced`, or a number above 0 for each class"):
        ClassArguments(class_weights=given)


def test_weights_as_a_file_or_a_command_line_has_them():
    assert ClassArguments(class_weights="balanced").class_weights == ["balanced"]
    assert ClassArguments(class_weights=["balanced"]).class_weights == ["balanced"]
    assert ClassArguments(class_weights=[1, "2.5"]).class_weights == [1.0, 2.5]


def test_a_weight_for_each_class_or_none():
    with pytest.raises(ValueError, match=r"class_weights has 2 numbers for 3 classes \(healthy, ill, odd\)"):
        class_weights([1.0, 2.0], rows(5, 5, 5), FEATURES["label"].names)
    stream = rows(8, 2, 2).to_iterable_dataset()
    with pytest.raises(ValueError, match="the images of a stream are not counted before its end"):
        class_weights(["balanced"], stream, FEATURES["label"].names)
    assert class_weights([1.0, 3.0, 2.0], stream, FEATURES["label"].names) == [0.5, 1.5, 1.0]


def test_rare_classes_are_named():
    assert rare([500, 100, 100], 700, NAMES) == ""
    said = rare([500, 9, 24], 533, NAMES)
    assert "'one' has 9, 'two' has 24" in said
    assert "nil" not in said


@pytest.mark.parametrize(
    ("counts", "advice"),
    [((80, 15, 5), "makes all count the same"), ((80, 20, 0), "makes all that have images count"), ((20, 19, 0), None)],
)
def test_weights_are_advised_where_they_change_something(caplog, counts, advice):
    warn_of_rare_classes(rows(*counts), FEATURES["label"].names, None)
    said = caplog.records[-1].getMessage()
    assert advice in said if advice else "class_weights" not in said


def test_many_classes_are_not_all_rare(caplog):
    names = [str(k) for k in range(100)]
    features = datasets.Features(label=datasets.ClassLabel(names=names))
    caplog.set_level(logging.WARNING)
    even = datasets.Dataset.from_dict({"label": [k for k in range(100) for _ in range(20)]}, features=features)
    warn_of_rare_classes(even, names, None)
    assert not caplog.records


def test_digit_images_are_as_many_of_each():
    # What the tests of the commands rely on.
    names = digit_images(60)[1]
    assert min(names.count(name) for name in NAMES) >= 10
