"""Small scans: DICOM and NIfTI files with shapes in them, made when they are needed."""

from pathlib import Path

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

# What must never leave the files.
NAME, PRIVATE = "Mustermann^Erika", "Secret Hospital of Mustermann"


def save_dicom(file, stored, patient="P1", **tags):
    """Writes stored values, unsigned of 16 bits, or of 8 as they are."""
    stored = np.asarray(stored)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(file), {}, file_meta=meta, preamble=bytes(128))
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = NAME, patient, "19700101"
    block = dataset.private_block(0x0011, "ACME", create=True)
    block.add_new(1, "LO", PRIVATE)
    dataset.Modality = "CT"
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.SamplesPerPixel = 3 if stored.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if stored.ndim == 3 else "MONOCHROME2"
    if stored.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = 8 * stored.itemsize
    dataset.BitsStored = tags.pop("BitsStored", dataset.BitsAllocated)
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    for name, value in tags.items():
        setattr(dataset, name, value)
    if tags.get("PixelData", b"") is not None:
        dataset.PixelData = stored.tobytes()
    else:
        del dataset.PixelData
    dataset.save_as(file, enforce_file_format=True)
    return Path(file)


def scan(generator, kind, size=24):
    """Stored values of a slice: a bright square on the left (kind 0) or on the right (kind 1), of 12 bits."""
    values = generator.integers(900, 1100, (size, size)).astype("uint16")
    left = 3 if kind == 0 else size // 2 + 1
    top = int(generator.integers(2, size // 2))
    values[top : top + size // 3, left : left + size // 3] += 900
    return values


def save_dicom_folder(folder, train=24, test=8, endings=(".dcm",), seed=0, patients=4):
    """Classes as folders, CT slices with a rescale intercept."""
    generator = np.random.default_rng(seed)
    for split, count in (("train", train), ("test", test)):
        for i in range(count):
            kind = i % 2
            target = Path(folder) / split / ("left", "right")[kind]
            target.mkdir(parents=True, exist_ok=True)
            patient = f"patient-{split}-{i % patients}"
            file = target / f"IM{i:04}{endings[i % len(endings)]}"
            save_dicom(file, scan(generator, kind), patient, RescaleSlope=1, RescaleIntercept=-1024)
    return Path(folder)


def save_nifti(file, values, affine=None):
    """Writes an array as it is."""
    nibabel.save(nibabel.Nifti1Image(np.asarray(values), np.eye(4) if affine is None else affine), file)
    return Path(file)


def pydicom_file(name):
    """The path of a test file that pydicom brings along."""
    return pydicom.data.get_testdata_file(name)
