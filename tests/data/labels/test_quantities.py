"""Numbers an image, from columns and lists, and what is said of those that cannot be learned."""

import re

import datasets
import numpy as np
import pytest
from digits import digit_images, save_with_metadata

from metalr_hf.data import QuantityArguments, load_quantities

pytestmark = pytest.mark.usefixtures("offline")


def numbers(name, image, row):
    return {"ink": float(np.asarray(image).mean()), "digit": ("nil", "one", "two").index(name)}


def load(name, **arguments):
    return load_quantities(QuantityArguments(dataset_name=str(name), **arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_with_metadata(tmp_path_factory.mktemp("images"), numbers)


def test_the_only_column_of_fractions_a_named_one_and_several(folder):
    images, names = digit_images(60)
    ink = [float(np.asarray(image).mean()) for image in images]
    one, named = load(folder), load(folder, label_column_name="digit")
    both = load(folder, target_column_names=["digit", "ink"])
    assert (one.class_names, named.class_names, both.class_names) == (("ink",), ("digit",), ("digit", "ink"))
    np.testing.assert_allclose(np.array(list(one.train["label"]))[:, 0], ink, rtol=1e-6)
    digit = [("nil", "one", "two").index(name) for name in names]
    np.testing.assert_allclose(np.array(list(both.train["label"])), np.stack([digit, ink], 1), rtol=1e-6)
    assert [label[0] for label in named.train["label"]] == digit


def test_lists_of_numbers_and_a_share_that_is_held_out(tmp_path):
    images, _ = digit_images(30)
    features = datasets.Features(image=datasets.Image(), box=datasets.List(datasets.Value("float64")))
    rows = {"image": images, "box": [[i, 2.0 * i] for i in range(30)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path))
    splits = load(tmp_path, label_column_name="box", test_share=0.2)
    assert splits.class_names == ("box_0", "box_1")
    # Whole numbers are not taken for classes, of which each would have to be on both sides.
    assert (splits.train.num_rows, splits.test.num_rows) == (24, 6)


def test_a_hundred_degrees_below_zero_is_a_number(tmp_path):
    # Trainer takes -100 for no label.
    folder = save_with_metadata(tmp_path, lambda name, image, row: {"cold": -100.0 if row else 20.0})
    label = load(folder).train[1]["label"][0]
    assert label != -100
    assert label == pytest.approx(-100)


@pytest.mark.parametrize(
    ("column", "arguments", "message"),
    [
        ({"ink": float("nan")}, {}, "Split 'train', column 'ink', row 0 has no number but nan. Leave such rows out"),
        ({"ink": None}, {"label_column_name": "ink"}, "column 'ink', row 0 has no number but None"),
        ({"ink": "n/a"}, {"label_column_name": "ink"}, "column 'ink', row 0 holds 'n/a', which is no number."),
        ({"ink": True}, {"label_column_name": "ink"}, "the column 'ink' holds classes, not numbers"),
        ({"ink": 3.5}, {}, "All 60 training images have the same number 'ink' (3.5)"),
        ({"more": 0.5}, {}, "2 label columns ('ink', 'more'). Name the one to use with label_column_name"),
        ({"ink": [1.0, 2.0][:1]}, {"target_column_names": ["inc"]}, "'inc' is not a column of the split 'train'"),
    ],
)
def test_columns_that_cannot_be_learned_are_told_in_one_line(tmp_path, column, arguments, message):
    folder = save_with_metadata(tmp_path, lambda *args: {**numbers(*args), **column})
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(folder, **arguments)
    assert "\n" not in str(error.value)


def test_the_text_among_numbers_is_named(tmp_path):
    def ages(name, image, i):
        return {"age": "n/a years" if i == 7 else str(20 + i)}

    with pytest.raises(ValueError, match=r"row \d+ holds 'n/a years', which is no number"):
        load(save_with_metadata(tmp_path, ages), label_column_name="age")


def test_classes_are_no_numbers(tmp_path):
    images, names = digit_images(12)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["nil", "one", "two"]))
    datasets.Dataset.from_dict({"image": images, "label": names}, features=features).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match="'label' holds classes, not numbers. .* train with --task classification"):
        load(tmp_path)
