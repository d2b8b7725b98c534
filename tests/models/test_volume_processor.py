"""NIfTI files to the inputs of a network, and its outputs back."""

from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor
from volumes import volume

from metalr_hf.models.volume_processor import NiftiFrame, VolumeImageProcessor, mask_like


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SRA", "PIL"])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 2.0), (2.0, 1.5, 1.0)])
def test_a_mask_goes_back_to_the_geometry_of_its_source(axcodes, spacing):
    image, mask = volume(axcodes=axcodes)
    processor = VolumeImageProcessor(spacing=spacing)
    prepared = processor([image], segmentation_maps=[mask])
    logits = torch.nn.functional.one_hot(prepared["labels"][0], 3).movedim(-1, 0)[None].float()
    (back,) = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), [image])
    assert np.allclose(back.affine, image.affine)
    same = np.asanyarray(back.dataobj) == np.asanyarray(mask.dataobj)
    assert same.mean() == 1 if spacing == (1.0, 1.0, 2.0) else same.mean() > 0.93


def test_the_header_of_a_mask_says_where_it_lies_and_nothing_of_the_patient(tmp_path):
    image, _ = volume()
    image.set_sform(image.affine, code="scanner")
    image.set_qform(np.diag([2.0, 1.5, 1.0, 1.0]), code="aligned", update_affine=False)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"Mustermann"
    image.header.set_slope_inter(2, 10)
    nibabel.save(image, tmp_path / "scan.nii")
    source = nibabel.load(tmp_path / "scan.nii")
    ids = np.arange(np.prod(image.shape), dtype=np.int64).reshape(image.shape) % 3
    mask_like(ids, NiftiFrame.of(source)).to_filename(tmp_path / "mask.nii.gz")
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    assert (np.asarray(mask.dataobj) == ids).all()
    assert mask.get_data_dtype() == np.uint8
    assert mask.header.get_zooms() == source.header.get_zooms()
    assert mask.header.get_xyzt_units() == ("mm", "sec")
    for way in ("get_sform", "get_qform"):
        there, here = (getattr(one, way)(coded=True) for one in (source, mask))
        assert there[1] == here[1]
        assert np.array_equal(there[0], here[0])
    assert bytes(mask.header["descrip"]).strip(b"\0") == b""


def test_a_path_bytes_and_an_open_image_are_the_same(tmp_path):
    image, _ = volume()
    nibabel.save(image, tmp_path / "scan.nii.gz")
    content = (tmp_path / "scan.nii.gz").read_bytes()
    ways = [
        str(tmp_path / "scan.nii.gz"),
        image,
        {"path": None, "bytes": content},
        {"path": None, "bytes": image.to_bytes()},
    ]
    processor = VolumeImageProcessor(spacing=(1, 1, 2))
    inputs = [processor(way, return_tensors="pt")["pixel_values"] for way in ways]
    assert all(torch.equal(inputs[0], other) for other in inputs[1:])


def test_channels_are_files_of_their_own_or_the_last_axis():
    image, _ = volume()
    other, _ = volume(seed=1)
    processor = VolumeImageProcessor(spacing=(1, 1, 2))
    several = processor([[image, other]])["pixel_values"][0]
    stacked = nibabel.Nifti1Image(np.stack([one.get_fdata() for one in (image, other)], -1), image.affine)
    assert several.shape == (2, 18, 16, 10)
    assert torch.allclose(several, processor([stacked])["pixel_values"][0])
    assert several.mean((1, 2, 3)).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert several.std((1, 2, 3)).tolist() == pytest.approx([1, 1], abs=1e-3)


def test_channels_that_lie_differently_are_refused():
    image, _ = volume()
    mirrored = nibabel.as_closest_canonical(image).as_reoriented([[0, -1], [1, 1], [2, 1]])
    with pytest.raises(ValueError, match="channels of a volume have different affines"):
        VolumeImageProcessor((1, 1, 2))([[image, mirrored]])


def test_intensities_outside_the_window_are_cut_off():
    image, _ = volume()
    inputs = VolumeImageProcessor((1, 1, 2), window=(0, 150), mean=75, std=75)(image)["pixel_values"][0]
    assert (inputs.min(), inputs.max()) == (-1, 1)


def test_the_slope_of_the_file_counts():
    image, _ = volume()
    scaled = nibabel.Nifti1Image(np.asanyarray(image.dataobj), image.affine)
    scaled.header.set_slope_inter(2, -1024)
    read = nibabel.Nifti1Image.from_bytes(scaled.to_bytes())
    plain = VolumeImageProcessor((1, 1, 2)).read(image)
    assert torch.allclose(VolumeImageProcessor((1, 1, 2)).read(read), plain * 2 - 1024)


def test_it_is_saved_and_loaded_without_a_warning(tmp_path, caplog):
    image, _ = volume()
    processor = VolumeImageProcessor((2, 2, 2), (32, 32, 16), window=(-160, 240), mean=40.5, std=99.0)
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert not caplog.records
    for name in ("spacing", "patch_size", "window", "mean", "std"):
        assert getattr(again, name) == getattr(processor, name)
    assert torch.equal(again(image)["pixel_values"][0], processor(image)["pixel_values"][0])
