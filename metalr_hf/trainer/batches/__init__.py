"""Batches beside those that are trained on: to tune and calibrate by, to fit a head to, for batch norm."""

from .calibrating import batches_to_look_at, larger_batch, largest_step
from .collated import EmptyMetaSetError, UnusableRowError
from .sets import create_meta_stream, own_data_methods, prepare_meta_dataset, spare_batches, stream_of
from .stream import MetaStream, check_meta_dataset, split_meta_dataset

__all__ = [
    "EmptyMetaSetError",
    "MetaStream",
    "UnusableRowError",
    "batches_to_look_at",
    "check_meta_dataset",
    "create_meta_stream",
    "larger_batch",
    "largest_step",
    "own_data_methods",
    "prepare_meta_dataset",
    "spare_batches",
    "split_meta_dataset",
    "stream_of",
]
