"""Of a folder of images nothing is left out without a word."""

import pytest
from PIL import Image

from metalr_hf.data.files.checks import check_folder
from metalr_hf.data.files.layout import folders_of_splits


def made(folder, *places):
    for place in places:
        (folder / place).mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(folder / place / "scan.png")
    return folder


def check(folder):
    check_folder(str(folder), folders_of_splits(str(folder)))


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
@pytest.mark.parametrize("inside", [".", "photos"])
def test_a_table_beside_the_splits(tmp_path, name, inside):
    made(tmp_path / inside, "train/a", "train/b", "test/a")
    check(tmp_path)
    (tmp_path / inside / name).touch()
    found = rf"{tmp_path / inside / name}' is not read, for it lies beside the folders of splits \('train', 'test'\). "
    with pytest.raises(ValueError, match=f"{found}Give each a {name} of its own"):
        check(tmp_path)


def test_a_table_of_the_whole_folder_is_beside_no_splits(tmp_path):
    made(tmp_path / "photos", "a", "b")
    (tmp_path / "metadata.csv").touch()
    check(tmp_path / "photos")
    (tmp_path / "photos" / "metadata.csv").touch()
    check(tmp_path / "photos")
