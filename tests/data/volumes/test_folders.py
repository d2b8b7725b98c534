"""Folders in nnU-Net's layout and in that of the Medical Segmentation Decathlon."""

import json

import datasets
import nibabel
import numpy as np
import pytest
from open_files import LEFT_OPEN
from volumes import LABELS, save_folder, volume

from metalr_hf.data.volumes import VolumeArguments, load_volumes
from metalr_hf.data.volumes.folders import holds_volumes, read_volume_folder, refuse_missing_file


@pytest.fixture
def folder(tmp_path):
    return save_folder(tmp_path / "scans", train=3, test=1)


def said(folder, **changes):
    file = folder / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_images_and_masks_meet_by_name(folder):
    splits, facts = read_volume_folder(str(folder))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 3, "test": 1}
    row = splits["train"][1]
    assert [entry["path"].rpartition("/")[2] for entry in row["image"]] == ["case_001_0000.nii.gz"]
    assert row["label"]["path"].endswith("labelsTr/case_001.nii.gz")
    assert facts.class_names == list(LABELS)
    assert not facts.is_ct


def test_the_channels_of_an_image_are_files_of_their_own_in_order(tmp_path):
    splits, _ = read_volume_folder(str(save_folder(tmp_path, train=2, test=0, channels=2)))
    assert [entry["path"][-11:-7] for entry in splits["train"][0]["image"]] == ["0000", "0001"]
    assert "test" not in splits


def test_the_decathlon_names_images_as_masks_and_classes_by_number(folder):
    for path in (folder / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace("_0000", "")))
    (folder / "imagesTr" / "._case_000.nii.gz").write_text("left by macOS")
    numbered = {str(number): name for name, number in LABELS.items()}
    said(folder, labels=numbered, channel_names=None, modality={"0": "CT"})
    splits, facts = read_volume_folder(str(folder))
    assert len(splits["train"]) == 3
    assert facts.class_names == list(LABELS)
    assert facts.is_ct


def test_the_label_to_ignore_is_no_class(folder):
    said(folder, labels=LABELS | {"ignore": 3})
    _, facts = read_volume_folder(str(folder))
    assert (facts.class_names, facts.ignore_index) == (list(LABELS), 3)


def test_an_image_without_a_mask_and_a_mask_without_an_image_are_named(folder):
    mask = folder / "labelsTr" / "case_002.nii.gz"
    mask.rename(folder / "labelsTr" / "case_009.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"case_002_0000.nii.gz has no mask.*case_002.nii.gz in .*labelsTr"):
        read_volume_folder(str(folder))
    (folder / "imagesTr" / "case_002_0000.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"case_009.nii.gz has no image"):
        read_volume_folder(str(folder))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"labels": {"background": 0, "organ": 2}}, r"must be 0, 1, 2 .* without a gap, not \[0, 2\]"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "several regions at once"),
        ({"labels": None}, "must hold `labels`"),
    ],
)
def test_labels_that_are_no_classes_are_refused(folder, changes, match):
    said(folder, **changes)
    with pytest.raises(ValueError, match=match) as error:
        read_volume_folder(str(folder))
    assert "dataset.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_holds_volumes_is_told_from_what_holds_images(folder, tmp_path):
    assert holds_volumes(str(folder))
    image, mask = volume()
    rows = {"scan": [image.to_bytes()], "mask": [mask.to_bytes()]}
    features = datasets.Features(scan=datasets.Nifti(), mask=datasets.Nifti())
    nifti = datasets.Dataset.from_dict(rows, features=features)
    nifti.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    nifti.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    assert holds_volumes(str(tmp_path / "saved"))
    assert holds_volumes(str(tmp_path / "parquet"))
    (tmp_path / "plain").mkdir()
    datasets.Dataset.from_dict({"label": [0]}).to_parquet(str(tmp_path / "plain" / "train.parquet"))
    assert not holds_volumes(str(tmp_path / "plain"))
    (tmp_path / "slices").mkdir()
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((16, 16, 1), dtype=np.int16), image.affine), tmp_path / "slices" / "a.nii"
    )
    assert not holds_volumes(str(tmp_path / "slices"))
    assert not holds_volumes(None)


def test_a_folder_without_its_dataset_json_is_told_of_it(folder, tmp_path):
    for other in (None, str(folder), str(tmp_path)):
        refuse_missing_file(other)
    (folder / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"{folder}/dataset.json is missing: .* names the classes"):
        load_volumes(VolumeArguments(dataset_name=str(folder)))


@LEFT_OPEN
@pytest.mark.usefixtures("offline", "open_files_are_left_here")
def test_a_table_of_volumes_is_no_layout_of_them(tmp_path):
    image, mask = volume()
    image.to_filename(tmp_path / "scan.nii.gz")
    mask.to_filename(tmp_path / "mask.nii.gz")
    (tmp_path / "metadata.csv").write_text("file_name,mask_file_name,site\nscan.nii.gz,mask.nii.gz,A\n")
    kinds = "'image' holds images, 'mask' holds images, 'site' holds text|'site' holds text, 'image' holds images, .*"
    with pytest.raises(ValueError, match=f"no column of volumes: ({kinds}). .* dataset.json, imagesTr and labelsTr"):
        load_volumes(VolumeArguments(dataset_name=str(tmp_path)))


def test_a_share_held_out_of_the_training_split_is_told_from_a_split_of_its_own(folder, tmp_path):
    of_its_own = load_volumes(VolumeArguments(str(folder))).test
    held_out = load_volumes(VolumeArguments(str(save_folder(tmp_path / "one", test=0)), test_share=0.34)).test
    assert (str(of_its_own.split), str(held_out.split)) == ("test", "train")
