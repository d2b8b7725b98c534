import nibabel
import numpy as np
import pytest
from scans import save_nifti

from metalr_hf.data.files import UnusableFileError, look_at, read_image
from metalr_hf.data.files.nifti import NiftiSlice, read_nifti

# Nothing is alike in it: as an axial slice x goes to the right, y to the front.
VALUES = (np.arange(20 * 30).reshape(20, 30) * 7 - 1000).astype("int16")


def entry(file):
    return {"bytes": None, "path": str(file)}


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 1), (20, 30, 1, 1)])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_an_axial_slice_has_the_front_on_top_and_the_right_side_on_the_left(tmp_path, shape, ending):
    file = save_nifti(tmp_path / f"slice{ending}", VALUES.reshape(shape))
    values = read_image(entry(file))
    assert values.shape == (30, 20)
    # x grows to the patient's right in the file, and the patient's right is on the left.
    assert values[0, 0] == VALUES[-1, -1]
    assert values[-1, -1] == VALUES[0, 0]
    assert values[0, -1] == VALUES[0, -1]
    assert look_at(entry(file)) == (True, 1, False)
    assert (read_image({"bytes": file.read_bytes(), "path": None}) == values).all()


def test_the_affine_and_not_the_order_in_the_file_says_how_a_slice_lies(tmp_path):
    straight = read_image(entry(save_nifti(tmp_path / "a.nii", VALUES[..., None])))
    flipped = save_nifti(tmp_path / "b.nii", VALUES[::-1, :, None], np.diag([-1.0, 1, 1, 1]))
    turned = save_nifti(tmp_path / "c.nii", VALUES.T[..., None], np.eye(4)[[1, 0, 2, 3]])
    assert (read_image(entry(flipped)) == straight).all()
    assert (read_image(entry(turned)) == straight).all()


@pytest.mark.parametrize("shape", [(20, 30), (20, 1, 30), (1, 20, 30), (20, 30, 1, 1)])
@pytest.mark.parametrize("axes", [[0, 1, 2], [1, 0, 2], [2, 0, 1]])
def test_a_mask_of_a_slice_goes_back_to_its_file(tmp_path, shape, axes):
    affine = np.eye(4)[[*axes, 3]] * [-1, 1, 2, 1]
    content = save_nifti(tmp_path / "slice.nii", (VALUES % 200).astype("uint8").reshape(shape), affine).read_bytes()
    ids, place = read_nifti(content), NiftiSlice.of(content)
    assert place.size == ids.shape
    mask = place.mask(ids)
    assert mask.shape == shape
    assert (np.asarray(mask.dataobj).ravel() == (VALUES % 200).ravel()).all()
    assert np.array_equal(mask.affine, affine)


def test_coronal_and_sagittal_slices_have_the_head_on_top(tmp_path):
    coronal = read_image(entry(save_nifti(tmp_path / "a.nii", VALUES[:, None])))
    assert (coronal == VALUES[::-1, ::-1].T).all()
    sagittal = read_image(entry(save_nifti(tmp_path / "b.nii", VALUES[None])))
    assert (sagittal == VALUES[::-1, ::-1].T).all()


def test_scaled_values_and_bytes_and_colours(tmp_path):
    image = nibabel.Nifti1Image(VALUES[..., None], np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    scaled = nibabel.Nifti1Image.from_bytes(image.to_bytes())
    values = read_image({"bytes": image.to_bytes(), "path": None})
    assert np.sort(values.ravel()) == pytest.approx(np.sort(np.asarray(scaled.dataobj).ravel()))
    file = save_nifti(tmp_path / "a.nii", VALUES.astype("uint8"))
    assert read_image(entry(file)).mode == "L"
    assert not look_at(entry(file)).deep
    colours = np.zeros((4, 6, 1), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    colours["G"] = 200
    file = save_nifti(tmp_path / "b.nii", colours)
    assert look_at(entry(file)) == (False, 3, False)
    assert np.asarray(read_image(entry(file)))[0, 0].tolist() == [0, 200, 0]


def test_a_volume_is_refused_with_advice(tmp_path):
    file = save_nifti(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), "int16"))
    for read in (look_at, read_image):
        with pytest.raises(UnusableFileError, match=r"shape \(4, 5, 6\), not one slice. Save the slices"):
            read(entry(file))
