import datasets
import numpy as np
import pytest

from metalr_hf.data.splits import flip_labels, fold_rows, stratified_subset


def rows(n):
    features = datasets.Features(
        label=datasets.ClassLabel(names=["red", "green", "blue"]), patient=datasets.Value("int64")
    )
    return datasets.Dataset.from_dict({"label": np.arange(n) % 3, "patient": np.arange(n) // 4}, features=features)


def test_folds_are_stratified_and_never_share_a_group():
    data = rows(60)
    for seed in (0, 1):
        for train, test in fold_rows(data, 5, seed, "patient"):
            patients = np.array(data["patient"])
            assert not set(patients[train]) & set(patients[test])
        for train, test in fold_rows(data, 5, seed):
            assert sorted([*train, *test]) == list(range(60))
            assert np.bincount(np.array(data["label"])[test]).tolist() == [4, 4, 4]


def test_a_subset_is_stratified_and_drawn_by_the_seed():
    data = rows(60)
    first, again, other = (stratified_subset(data, 30, seed) for seed in (0, 0, 1))
    assert np.bincount(first["label"]).tolist() == [10, 10, 10]
    assert first["patient"] == again["patient"] != other["patient"]
    assert stratified_subset(data, 60, 0) is data


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_the_asked_share_of_labels_is_flipped_to_another_class(share):
    data = rows(60)
    noisy = flip_labels(data, share, seed=3)
    assert noisy.features == data.features
    changed = np.array(noisy["label"]) != np.array(data["label"])
    assert changed.sum() == round(share * 60)
    assert noisy["label"] == flip_labels(data, share, seed=3)["label"]
