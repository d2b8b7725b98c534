import gc

import numpy as np
import pandas
import pytest
from PIL import Image
from scans import save_dicom, save_dicom_folder, save_nifti

from metalr_hf.data.files.folders import holds_other_images, image_files, is_image_file, walk
from metalr_hf.data.loading import DataArguments, load_images

pytestmark = pytest.mark.usefixtures("offline")


def test_classes_are_folders_of_files_with_any_ending_or_none(tmp_path):
    save_dicom_folder(tmp_path, endings=(".dcm", "", ".1", ".DCM"))
    (tmp_path / "train" / "left" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "train" / "left" / "notes.txt").write_text("left out")
    (tmp_path / "LICENSE").write_text("left out, too")
    (tmp_path / "train" / "left" / "._0.dcm").write_bytes(b"of macOS")
    assert len(list(image_files(str(tmp_path)))) == 32
    splits = load_images(DataArguments(dataset_name="imagefolder", data_dir=str(tmp_path)))
    assert splits.class_names == ("left", "right")
    assert (len(splits.train), len(splits.test)) == (24, 8)
    image = splits.train[0]["image"]
    assert image.shape == (24, 24)
    assert -130 < np.median(image) < 80
    # The same by its path, and as a stream.
    assert load_images(DataArguments(dataset_name=str(tmp_path))).train[0]["image"].tolist() == image.tolist()
    stream = load_images(DataArguments(dataset_name=str(tmp_path), streaming=True, intensity_window=["0", "900"]))
    assert next(iter(stream.train))["image"].tolist() == image.tolist()


# `datasets` leaves the table open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:The metadata.csv of .* lists images again")
def test_formats_may_be_mixed_and_named_in_a_metadata_csv(tmp_path):
    values = np.arange(20 * 20, dtype="uint16").reshape(20, 20) * 10
    save_dicom(tmp_path / "a.dcm", values)
    save_nifti(tmp_path / "b.nii.gz", values)
    np.save(tmp_path / "c.npy", values)
    Image.fromarray(values).save(tmp_path / "d.png")
    Image.fromarray(values.astype("float32")).save(tmp_path / "e.tif")
    Image.fromarray(values.astype("uint8")).save(tmp_path / "f.png")
    names = ["a.dcm", "b.nii.gz", "c.npy", "d.png", "e.tif", "f.png"] * 2
    rows = {"file_name": names, "label": ["x", "y"] * 6, "patient": [f"p{i % 6}" for i in range(12)]}
    pandas.DataFrame(rows).to_csv(tmp_path / "metadata.csv", index=False)
    args = DataArguments(dataset_name=str(tmp_path), group_column="patient", test_share=0.5)
    splits = load_images(args)
    assert set(splits.train["patient"]).isdisjoint(splits.test["patient"])
    kinds = {type(row["image"]) for part in (splits.train, splits.test) for row in part}
    assert len(kinds) == 2
    assert splits.window is not None
    # Here, where it may be warned of, and not in a later test.
    del splits
    gc.collect()


def test_classes_of_nifti_are_folders_too(tmp_path):
    for i in range(8):
        (tmp_path / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        save_nifti(tmp_path / "train" / "ab"[i % 2] / f"{i}.nii.gz", np.full((4, 5), i * 100, "int16"))
    splits = load_images(DataArguments(dataset_name=str(tmp_path), test_share=0.5))
    assert splits.class_names == ("a", "b")
    assert splits.train[0]["image"].shape == (5, 4)


def test_photographs_alone_are_left_to_datasets(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert not holds_other_images(str(tmp_path))
    np.save(tmp_path / "b.npy", np.zeros((4, 4)))
    assert holds_other_images(str(tmp_path))
    assert not is_image_file(str(tmp_path / "metadata.csv"))


def test_links_to_folders_are_walked_through_and_none_for_ever(tmp_path):
    inside, elsewhere = tmp_path / "inside", tmp_path / "elsewhere"
    for folder in (inside / "a" / ".hidden", elsewhere / "deeper"):
        folder.mkdir(parents=True)
    (elsewhere / "deeper" / "scan.png").touch()
    (inside / "b").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(inside)
    (inside / "itself").symlink_to("itself")
    assert [level.folder.removeprefix(str(inside)) for level in walk(str(inside))] == ["", "/a", "/b", "/b/deeper"]
    assert [level.start for level in walk(str(inside))][2:] == [str(inside / "b")] * 2
    assert list(image_files(str(inside))) == [str(inside / "b" / "deeper" / "scan.png")]
    assert list(walk(str(tmp_path / "nothing"))) == []
