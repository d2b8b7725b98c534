import numpy as np
import pytest
from scans import save_dicom_folder

from metalr_hf.data.loading import DataArguments, load_images

pytestmark = pytest.mark.usefixtures("offline")


def arguments(folder, **kwargs):
    return DataArguments(dataset_name=str(folder), group_column="PatientID", **kwargs)


def test_the_tag_of_the_patient_keeps_a_patient_on_one_side(tmp_path):
    folder = save_dicom_folder(tmp_path, train=40, test=0, patients=10)
    splits = load_images(arguments(folder))
    one, other = set(splits.train["PatientID"]), set(splits.test["PatientID"])
    assert one
    assert other
    assert not one & other
    assert len(one | other) == 10
    # Neither the identity nor a part of it, and the same name the same way each time.
    assert not [name for name in one | other if "train" in name]
    assert set(load_images(arguments(folder)).train["PatientID"]) == one


def test_splits_that_share_a_patient_are_refused_without_telling_who(tmp_path):
    save_dicom_folder(tmp_path, train=8, test=4)
    for file in (tmp_path / "test").rglob("*.dcm"):
        file.unlink()
    for folder in ("left", "right"):
        file = next((tmp_path / "train" / folder).glob("*.dcm"))
        (tmp_path / "test" / folder / f"again-{file.name}").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="share . of its values") as told:
        load_images(arguments(tmp_path))
    assert "train-" not in str(told.value)
    assert load_images(arguments(tmp_path, allow_shared_groups=True)).train


def test_files_without_the_tag_are_told_of(tmp_path):
    save_dicom_folder(tmp_path, train=8, test=4)
    missing = DataArguments(dataset_name=str(tmp_path), group_column="StudyID")
    with pytest.raises(ValueError, match=r"group_column='StudyID': \d+ of the train images have no group"):
        load_images(missing)
    np.save(tmp_path / "train" / "left" / "a.npy", np.zeros((4, 4), "uint16"))
    with pytest.raises(ValueError, match=r"a.npy\): group_column='PatientID' is no column but a tag of DICOM files"):
        load_images(arguments(tmp_path))
    with pytest.raises(ValueError, match="group_column='patient' is neither a column"):
        load_images(DataArguments(dataset_name=str(tmp_path), group_column="patient"))
