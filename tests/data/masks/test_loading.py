import gc
import json

import datasets
import numpy as np
import pytest
from cells import SIZE, cells, save_cells
from PIL import Image
from scans import save_dicom, save_nifti
from transformers import SegformerImageProcessor, set_seed

from metalr_hf.data.intensity import set_window
from metalr_hf.data.loading import DataArguments
from metalr_hf.data.masks import MaskTransform
from metalr_hf.data.masks.loading import FIRST_MASKS, MaskArguments, load_masks, read_mask

pytestmark = pytest.mark.usefixtures("offline")


def arguments(name=None, **kwargs):
    return MaskArguments(dataset_name=None if name is None else str(name), **kwargs)


def masks(split):
    return [read_mask(row) for row in split["label"]]


def folder(tmp_path, change=lambda mask, split, i: mask, columns=("image", "mask"), **kwargs):
    """Parquet files of cells with changed masks."""
    for name, split in cells(**kwargs).items():
        changed = {
            columns[0]: list(split["image"]),
            columns[1]: [
                Image.fromarray(np.asarray(change(np.array(mask), name, i))) for i, mask in enumerate(split["mask"])
            ],
        }
        features = datasets.Features({column: datasets.Image() for column in columns})
        datasets.Dataset.from_dict(changed, features=features).to_parquet(tmp_path / f"{name}.parquet")
    return tmp_path


@pytest.mark.parametrize("how", ["folder", "imagefolder", "parquet", "saved"])
def test_images_and_masks_stay_together_however_they_are_stored(tmp_path, how):
    if how == "parquet":
        splits = load_masks(arguments(folder(tmp_path)))
    elif how == "saved":
        cells().save_to_disk(tmp_path / "saved")
        splits = load_masks(arguments(tmp_path / "saved"))
    else:
        save_cells(tmp_path / "images")
        given = {"data_dir": str(tmp_path / "images")} if how == "imagefolder" else {}
        splits = load_masks(arguments("imagefolder" if given else tmp_path / "images", **given))
    assert (splits.train.num_rows, splits.test.num_rows, splits.meta) == (12, 4, None)
    assert splits.class_names == ("0", "1")
    expected = {np.array(row["image"]).tobytes(): np.array(row["mask"]) for row in cells()["train"]}
    for row in splits.train:
        assert (read_mask(row["label"]) == expected[np.array(row["image"]).tobytes()]).all()


def test_the_default_is_generated_cells():
    splits = load_masks(arguments(max_train_samples=10))
    assert splits.class_names == ("inside", "membrane")
    assert splits.id2label == {0: "inside", 1: "membrane"}
    assert (splits.train.num_rows, splits.test.num_rows) == (10, 32)


@pytest.mark.parametrize("columns", [("image", "label"), ("label", "annotation"), ("pixels", "semantic_mask")])
def test_columns_of_other_names(tmp_path, columns):
    given = {"image_column_name": "label"} if columns[0] == "label" else {}
    splits = load_masks(arguments(folder(tmp_path, columns=columns), **given))
    assert splits.train.column_names == ["image", "label"]
    assert {int(mask.max()) for mask in masks(splits.train)} == {1}


def test_columns_that_are_not_clear_are_asked_for(tmp_path):
    name = folder(tmp_path, columns=("a", "b"))
    with pytest.raises(ValueError, match="2 image columns .*image_column_name. Its columns: 'a', 'b'"):
        load_masks(arguments(name))
    with pytest.raises(ValueError, match="no mask column. .*mask_column_name.*metadata.csv"):
        load_masks(arguments(name, image_column_name="a"))
    with pytest.raises(ValueError, match="mask_column_name='c' is not a column"):
        load_masks(arguments(name, mask_column_name="c"))
    assert load_masks(arguments(name, image_column_name="a", mask_column_name="b")).train.num_rows == 12


def test_black_and_white_masks_are_two_classes(tmp_path):
    splits = load_masks(arguments(folder(tmp_path, lambda mask, *_: mask * 255), class_names=["inside", "membrane"]))
    assert splits.class_names == ("inside", "membrane")
    mask = masks(splits.train)[0]
    assert (splits.classes.ids(mask) == (mask == 255)).all()


def test_black_and_white_masks_of_a_stream_are_two_classes(tmp_path):
    def blacken_the_first(mask, split, i):
        return mask * 255 if i >= (FIRST_MASKS + 2 if split == "train" else 0) else mask * 0

    # Empty masks often come first.
    name = folder(tmp_path, blacken_the_first, train=FIRST_MASKS + 4)
    splits = load_masks(arguments(name, streaming=True, class_names=["inside", "membrane"]))
    for stream in (splits.train, splits.test):
        for row in stream:
            mask = read_mask(row["label"])
            assert (splits.classes.ids(mask) == (mask == 255)).all()
    given = load_masks(arguments(name, streaming=True, class_names=["inside", "membrane"], ignore_index=255))
    assert given.classes.values == (0, 1)
    assert given.classes.ids(np.array([[255, 1]])).tolist() == [[255, 1]]


def test_255_in_a_stream_of_other_ids_does_not_count(tmp_path):
    def ignore(mask, *_):
        mask[0] = 255
        return mask

    splits = load_masks(arguments(folder(tmp_path, ignore), streaming=True, class_names=["inside", "membrane"]))
    ids = splits.classes.ids(read_mask(next(iter(splits.train))["label"]))
    assert (ids[0] == 255).all()
    assert set(np.unique(ids[1:])) == {0, 1}


@pytest.mark.parametrize("value", [0, 255])
def test_a_stream_that_leaves_open_what_255_is_is_refused_with_what_to_do(tmp_path, value):
    name = folder(tmp_path, lambda mask, *_: np.full_like(mask, value))
    given = {"streaming": True, "class_names": ["inside", "membrane"]}
    with pytest.raises(ValueError, match=f"hold the value {value} only.*with ignore_index=255; else leave out stream"):
        load_masks(arguments(name, **given))
    assert load_masks(arguments(name, ignore_index=255, **given)).classes.values == (0, 1)


def test_a_bad_mask_among_the_first_of_a_stream_is_named(tmp_path):
    save_cells(tmp_path / "images")
    broken = tmp_path / "images" / "train" / "3_mask.png"
    Image.new("RGB", (SIZE, SIZE), "red").save(broken)
    with pytest.raises(ValueError, match=r"Split 'train', row 3.*has colours"):
        load_masks(arguments(tmp_path / "images", streaming=True, class_names=["inside", "membrane"]))


def test_ignored_pixels_are_of_no_class(tmp_path):
    def ignore(mask, *_):
        mask[0] = 7
        return mask

    splits = load_masks(arguments(folder(tmp_path, ignore), ignore_index=7))
    assert splits.class_names == ("0", "1")
    ids = splits.classes.ids(masks(splits.train)[0])
    assert (ids[0] == 255).all()
    assert set(np.unique(ids[1:])) == {0, 1}


def test_a_mask_of_another_size_is_refused_with_its_row_its_file_and_both_sizes(tmp_path):
    def shrink(mask, split, i):
        return mask[:, :30] if (split, i) == ("test", 2) else mask

    with pytest.raises(
        ValueError, match=r"Split 'test', row 2.*: the mask is 30 × 32 pixels .*its image 32 × 32. Resize .* nearest"
    ):
        load_masks(arguments(folder(tmp_path, shrink)))
    save_cells(tmp_path / "images")
    Image.fromarray(np.zeros((9, SIZE), "uint8")).save(tmp_path / "images" / "train" / "3_mask.png")
    with pytest.raises(ValueError, match=r"row \d+ \(.*3_mask.png\): the mask is 32 × 9 pixels"):
        load_masks(arguments(tmp_path / "images"))


def test_images_on_their_side_have_the_size_that_they_are_decoded_to(tmp_path):
    splits = cells(train=2, test=1)
    save_cells(tmp_path, splits)
    wide = Image.fromarray(np.zeros((SIZE, 2 * SIZE), "uint8"))
    orientation = Image.Exif()
    orientation[0x0112] = 6
    wide.save(tmp_path / "train" / "0.png", exif=orientation)
    mask = np.zeros((2 * SIZE, SIZE), "uint8")
    mask[0] = 1
    Image.fromarray(mask).save(tmp_path / "train" / "0_mask.png")
    loaded = load_masks(arguments(tmp_path)).train
    assert sorted(row["image"].size for row in loaded) == [(SIZE, SIZE), (SIZE, 2 * SIZE)]


@pytest.mark.parametrize("names", [None, ["inside", "membrane"]])
def test_a_class_id_out_of_range_is_refused_with_its_row_and_the_value(tmp_path, names):
    def spoil(split, i, value):
        def change(mask, at_split, at):
            if (at_split, at) == (split, i):
                mask[3, 5] = value
            return mask

        return change

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    name = folder(tmp_path / "a", spoil("test", 1, 9))
    with pytest.raises(ValueError, match=r"Split 'test', row 1.*class id 9, which is none of the 2 classes"):
        load_masks(arguments(name, class_names=names))
    name = folder(tmp_path / "b", spoil("train", 5, 200))
    with pytest.raises(ValueError, match=r"Split 'train', row 5.*class id 200"):
        load_masks(arguments(name, class_names=names))


def test_masks_that_are_pictures_or_of_one_class_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    name = folder(tmp_path / "a", lambda mask, *_: mask[..., None] * np.array([1, 0, 0], "uint8"))
    with pytest.raises(ValueError, match=r"Split 'train', row 0.*has colours \(mode RGB\)"):
        load_masks(arguments(name))
    name = folder(tmp_path / "b", lambda mask, *_: mask * 0)
    with pytest.raises(ValueError, match=r"every mask is empty \(only 0\)"):
        load_masks(arguments(name))
    name = folder(tmp_path / "c", lambda mask, *_: mask * 255)
    with pytest.raises(ValueError, match=r"1 classes \(0\).* Pixels of the value ignore_index=255 do not count"):
        load_masks(arguments(name, ignore_index=255))


def test_a_named_class_that_no_training_mask_holds_is_warned_of(tmp_path, caplog):
    name = folder(tmp_path)
    load_masks(arguments(name, class_names=["inside", "membrane"]))
    assert not caplog.text
    load_masks(arguments(name, class_names=["inside", "membrane", "nucleus"]))
    assert "No training mask holds a pixel of 'nucleus', which cannot be learned." in caplog.text


@pytest.mark.parametrize("names", [None, ["background", "lesion"]])
def test_masks_that_were_saved_as_jpeg_are_refused_with_what_that_did(tmp_path, names):
    save_cells(tmp_path)
    mask = Image.open(tmp_path / "train" / "3_mask.png")
    white = Image.fromarray(np.array(mask) * np.uint8(255))
    mask.close()
    white.save(tmp_path / "train" / "3_mask.jpg", quality=75)
    table = tmp_path / "train" / "metadata.jsonl"
    table.write_text(table.read_text().replace("3_mask.png", "3_mask.jpg"))
    with pytest.raises(ValueError, match=r"3_mask.jpg\): .* JPEG file, which changes the values .* Save masks as PNG"):
        load_masks(arguments(tmp_path, class_names=names))


def test_a_jpeg_of_two_values_is_a_mask(tmp_path):
    Image.fromarray(np.repeat(np.array([[0, 255]], "uint8"), 8, 1).repeat(8, 0)).save(tmp_path / "0.jpg", quality=100)
    assert set(np.unique(read_mask({"bytes": None, "path": str(tmp_path / "0.jpg")}))) == {0, 255}


def test_a_stream_needs_the_names_of_its_classes(tmp_path):
    name = folder(tmp_path)
    with pytest.raises(ValueError, match="Name them with class_names"):
        load_masks(arguments(name, streaming=True))
    splits = load_masks(arguments(name, streaming=True, class_names=["inside", "membrane"], max_train_samples=3))
    assert len(list(splits.train)) == 3


def test_a_share_of_the_training_split_is_held_out(tmp_path):
    cells()["train"].to_parquet(tmp_path / "train.parquet")
    splits = load_masks(arguments(tmp_path, test_share=0.25))
    assert (splits.train.num_rows, splits.test.num_rows) == (9, 3)
    rows = {np.array(image).tobytes() for split in (splits.train, splits.test) for image in split["image"]}
    assert len(rows) == 12


def test_segmentation_is_measured_by_dice():
    assert arguments().metrics == ["dice"]
    # As a YAML file gives a single one.
    assert arguments(metrics="dice").metrics == ["dice"]
    assert DataArguments().metrics == ["accuracy", "macro_f1"]
    with pytest.raises(ValueError, match=r"metrics=\['accuracy'\]: segmentation is measured by dice"):
        arguments(metrics=["accuracy"])


@pytest.mark.parametrize(
    "store",
    [
        lambda mask: np.repeat(mask[..., None], 3, -1),
        lambda mask: np.stack([mask, mask, mask, np.full_like(mask, 255)], -1),
        lambda mask: mask.astype("float32"),
        lambda mask: mask.astype("int32"),
        lambda mask: mask.astype("uint16"),
    ],
    ids=["rgb", "rgba", "float", "int32", "uint16"],
)
def test_grey_masks_hold_the_same_ids_however_they_are_stored(tmp_path, store):
    for name, split in cells().items():
        lines = []
        for i, row in enumerate(split):
            (tmp_path / name).mkdir(exist_ok=True)
            row["image"].save(tmp_path / name / f"{i}.png")
            Image.fromarray(store(np.array(row["mask"]))).save(tmp_path / name / f"{i}_mask.tif")
            lines.append(f'{{"file_name": "{i}.png", "mask_file_name": "{i}_mask.tif"}}')
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(lines))
    splits = load_masks(arguments(tmp_path))
    assert splits.class_names == ("0", "1")
    for loaded, mask in zip(masks(splits.test), cells()["test"]["mask"], strict=True):
        assert (loaded == np.array(mask)).all()
        assert splits.classes.ids(loaded).dtype == np.uint8


def test_a_mask_with_fractions_is_refused_with_the_value(tmp_path):
    save_cells(tmp_path)
    file = tmp_path / "train" / "3_mask.png"
    Image.fromarray(np.full((SIZE, SIZE), 0.25, "float32")).save(file, format="tiff")
    with pytest.raises(ValueError, match=r"3_mask.png\): the mask holds the value 0.25 \(mode F\), but"):
        load_masks(arguments(tmp_path))


# `datasets` leaves the table open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_scans_stand_beside_masks_of_any_format(tmp_path):
    """Of 16 bits, and in the orientation of their NIfTI files, image and mask alike."""
    names, generator = [], np.random.default_rng(0)
    for i in range(6):
        mask = np.zeros((20, 30), "uint8")
        mask[2 : 8 + i, 4:9] = 1
        values = (generator.integers(0, 200, mask.shape) + 1000 * mask.astype(int)).astype("int16")
        if i % 2:
            save_nifti(tmp_path / f"{i}.nii.gz", values)
            save_nifti(tmp_path / f"{i}_mask.nii.gz", mask.astype("float32" if i == 1 else "uint8"))
            names.append((f"{i}.nii.gz", f"{i}_mask.nii.gz"))
        else:
            save_dicom(tmp_path / f"{i}.dcm", values)
            Image.fromarray(mask).save(tmp_path / f"{i}_mask.png")
            names.append((f"{i}.dcm", f"{i}_mask.png"))
    rows = [f"{image},{mask}" for image, mask in names]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,mask_file_name", *rows]))
    splits = load_masks(arguments(tmp_path, test_share=0.34))
    assert splits.window.source == "training images"
    assert splits.class_names == ("0", "1")
    for row in splits.train:
        mask = read_mask(row["label"])
        assert mask.shape == row["image"].shape
        assert (mask == (row["image"] > 500)).all()
    processor = SegformerImageProcessor(size={"height": 32, "width": 32}, do_reduce_labels=False)
    set_window(processor, splits.window)
    # A crop may miss the mask.
    set_seed(0)
    for augment in ("none", "crop_flip"):
        prepared = MaskTransform(processor, splits.classes, augment)(splits.train[:])
        for pixels, mask in zip(prepared["pixel_values"], prepared["labels"], strict=True):
            assert pixels.shape == (3, 32, 32)
            assert pixels[0][mask == 1].median() > pixels[0][mask == 0].median() + 1
    # Here, where it may be warned of, and not in a later test.
    del splits
    gc.collect()


def test_a_nifti_mask_that_lies_elsewhere_than_its_image_is_refused(tmp_path):
    affine, mask = np.diag([-0.5, 0.5, 3.0, 1.0]), np.zeros((30, 20, 1), "uint8")
    affine[:3, 3], mask[4:9, 5:8] = (40.0, -20.0, 7.0), 1

    def save(name, way=affine, stored=mask):
        (tmp_path / name).mkdir()
        for i in range(3):
            save_nifti(tmp_path / name / f"{i}.nii.gz", mask.astype("int16") * 1000, affine)
            save_nifti(tmp_path / name / f"{i}_mask.nii.gz", stored if i == 1 else mask, way if i == 1 else affine)
        rows = [json.dumps({"file_name": f"{i}.nii.gz", "mask_file_name": f"{i}_mask.nii.gz"}) for i in range(3)]
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(rows))
        return arguments(tmp_path / name, test_share=0.34)

    moved = affine.copy()
    moved[0, 3] += 2
    with pytest.raises(
        ValueError, match=r"1_mask.nii.gz\): the mask lies elsewhere than its image: up to 2 mm "
    ) as error:
        load_masks(save("moved", moved))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"1_mask.nii.gz\): the mask lies elsewhere than its image: up to"):
        load_masks(save("lost", np.eye(4)))
    # Rounded numbers, and the same place stored in another way.
    load_masks(save("rounded", affine + 0.0005))
    turned = affine.copy()
    turned[:, 0], turned[:3, 3] = -affine[:, 0], affine[:3, 3] + 29 * affine[:3, 0]
    thick = turned.copy()
    thick[2, 2] = 1.0
    for i, way in enumerate((turned, thick)):
        splits = load_masks(save(f"turned-{i}", way, mask[::-1]))
        for row in splits.train:
            assert (read_mask(row["label"]) == (row["image"] > 500)).all()


@pytest.mark.parametrize("name", ["3.png", "3_mask.png"])
def test_of_an_image_and_its_mask_the_one_that_is_broken_is_named(tmp_path, name):
    save_cells(tmp_path / "images")
    broken = tmp_path / "images" / "train" / name
    broken.write_bytes(broken.read_bytes()[:60])
    message = rf"Split 'train', row 3 \({broken}\): the file cannot be read \(.*truncated.*\). Repair it, or leave out"
    with pytest.raises(ValueError, match=message):
        load_masks(arguments(tmp_path / "images"))
