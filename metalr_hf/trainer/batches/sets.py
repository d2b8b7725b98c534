"""Which images validation batches are taken from: a set that was given, a share held out, or the training set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import datasets
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer

from ...messages import first_line
from ...tuning.contexts import preserve_random_state
from .stream import MetaStream, check_meta_dataset, split_meta_dataset

if TYPE_CHECKING:
    from ..metalr import MetaLRTrainer


# What a subclass overrides to draw training images in its own way.
OWN_DATA = ("get_train_dataloader", "_get_train_sampler")


def prepare_meta_dataset(trainer: MetaLRTrainer) -> None:
    """Holds out the share of the training set that `meta_split` names, or checks the meta set that was given.

    Args:
        trainer ([`~metalr_hf.MetaLRTrainer`]): Its `train_dataset` and `meta_dataset` are set.

    Raises:
        ValueError: if both are given, or the meta set cannot be tuned on.
    """
    args = trainer.args
    if trainer.meta_dataset is not None and args.meta_split > 0:
        raise ValueError(
            f"meta_dataset and meta_split={args.meta_split} are both given. Leave out one: a meta_dataset is used "
            "as it is, meta_split holds out a share of train_dataset."
        )
    if args.meta_split > 0:
        trainer.train_dataset, trainer.meta_dataset = split_meta_dataset(
            trainer.train_dataset,
            args.meta_split,
            label_column=_label_column(trainer, trainer.train_dataset),
            seed=args.seed,
        )
    elif trainer.meta_dataset is not None:
        classifier = type(trainer.model).__name__.endswith("ForImageClassification")
        check_meta_dataset(
            trainer.meta_dataset,
            label_column=_label_column(trainer, trainer.meta_dataset),
            num_classes=trainer.model.config.num_labels if classifier else None,
        )
        _refuse_unprepared(trainer)


def _refuse_unprepared(trainer: MetaLRTrainer) -> None:
    rows = trainer.meta_dataset
    if isinstance(rows, IterableDataset):
        # It may be read only once.
        return
    columns, collator = _as_trainer_reads(trainer, rows)
    try:
        with preserve_random_state(trainer.args.device):
            # Some collators mix two.
            batch = collator([columns[i] for i in range(min(2, len(columns)))])
    except Exception as error:
        raise ValueError(
            f"meta_dataset: its first rows make no batch ({first_line(error)}). Prepare it like the training set, with "
            "the same transform and columns."
        ) from error
    labels = {"label", "labels", *(trainer.label_names or ())}
    if isinstance(batch, Mapping) and not any(isinstance(batch[name], Tensor) for name in batch.keys() - labels):
        raise ValueError(
            f"meta_dataset: of its rows the model gets no images, but {', '.join(batch) or 'nothing'}. Prepare it like "
            "the training set, with the same transform and columns."
        )


def _as_trainer_reads(trainer: Trainer, dataset: Any) -> tuple[Any, Any]:
    # The two preparations that Trainer gives to its own loaders; no public method does them.
    if isinstance(dataset, datasets.Dataset):
        return trainer._remove_unused_columns(dataset, description="meta"), trainer.data_collator
    return dataset, trainer._get_collator_with_removed_columns(trainer.data_collator, description="meta")


def create_meta_stream(trainer: MetaLRTrainer) -> MetaStream:
    """Makes the stream of validation batches, from the meta set or else from the training set.

    Args:
        trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer.

    Returns:
        [`~metalr_hf.trainer.batches.MetaStream`]

    Raises:
        ValueError: if the training batches come from a loader or sampler of the user's own, which it would pass by, or
            from rows that may be read only once, which it would take from the training.
    """
    if trainer.meta_dataset is None:
        _refuse_to_read_beside(trainer)
    own, dataset = trainer.args.meta_batch_size, trainer.meta_dataset
    # What auto_find_batch_size has found, else args.train_batch_size.
    found = trainer._train_batch_size
    if own is not None:
        own = own * max(1, trainer.args.n_gpu)
        # A batch size of the user's own has to shrink too, or no training batch would ever be small enough.
        own = min(own, found) if found < trainer.args.train_batch_size else own
    return stream_of(
        trainer,
        trainer.train_dataset if dataset is None else dataset,
        found if own is None else own,
    )


def _refuse_to_read_beside(trainer: MetaLRTrainer) -> None:
    own_data, dataset = own_data_methods(trainer), trainer.train_dataset
    if own_data or dataset is None:
        which = own_data[0] if own_data else "train_dataset=None"
        why = f"{which} says which training images are drawn, and a stream of validation batches would not know"
    elif _may_be_read_once(dataset):
        why = (
            f"train_dataset is a {type(dataset).__name__}, which may be read only once, and a stream of validation "
            "batches would take its rows from the training"
        )
    else:
        return
    raise ValueError(
        f'meta_source="stream": {why}. Pass the images to tune on as meta_dataset, or leave out meta_source: '
        '"next_batch" takes the training batches as they come.'
    )


def own_data_methods(trainer: Trainer) -> list[str]:
    """The methods by which a subclass draws training images in its own way.

    Args:
        trainer (`transformers.Trainer`): The trainer.

    Returns:
        `list[str]`: their names.
    """
    return [name for name in OWN_DATA if getattr(type(trainer), name) is not getattr(Trainer, name)]


def stream_of(
    trainer: Trainer,
    dataset: Any,
    batch_size: int,
    seed: int = 0,
    batches_to_shuffle: int | None = None,
    alone: bool = False,
) -> MetaStream:
    """A stream of a trainer's batches: its columns, collator, workers and processes.

    Args:
        trainer (`transformers.Trainer`): The trainer.
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or torch dataset): Where the rows come from.
        batch_size (`int`): Rows a batch.
        seed (`int`, *optional*, defaults to 0): Added to that of the run's data.
        batches_to_shuffle (`int`, *optional*): For a few batches only, not worth the wait for workers: how many a
            streamed dataset is shuffled over.
        alone (`bool`, *optional*, defaults to `False`): Whether every process takes all batches, not its share of them.

    Returns:
        [`MetaStream`]
    """
    args = trainer.args
    num_workers, buffer = args.dataloader_num_workers, {}
    if batches_to_shuffle is not None:
        num_workers, buffer = 0, {"shuffle_buffer_size": batches_to_shuffle * batch_size}
    dataset, collator = _as_trainer_reads(trainer, dataset)
    return MetaStream(
        dataset,
        batch_size,
        collator,
        seed=seed + (args.seed if args.data_seed is None else args.data_seed),
        num_workers=num_workers,
        pin_memory=args.dataloader_pin_memory,
        process_index=0 if alone else args.process_index,
        num_processes=1 if alone else args.world_size,
        **buffer,
    )


def spare_batches(
    trainer: Trainer, images: int, batch_size: int | None = None, seed: int = 0, alone: bool = True
) -> Iterator[Any] | None:
    """A few training batches beside those that are trained on.

    None is taken from the training's own order. Random numbers are the caller's.

    Args:
        trainer (`transformers.Trainer`): The trainer.
        images (`int`): How many images, a batch more or less.
        batch_size (`int`, *optional*): Images a batch; by default as many as are trained on at a time.
        seed (`int`, *optional*, defaults to 0): Added to that of the run's data.
        alone (`bool`, *optional*, defaults to `True`): Whether every process takes all of them, not its share.

    Returns:
        `Iterator`: batches as the data loader gives them, or `None` if a second reader would take rows of the first.
    """
    dataset, batch_size = trainer.train_dataset, batch_size or trainer._train_batch_size
    if dataset is None or own_data_methods(trainer) or _may_be_read_once(dataset):
        return None
    stream = stream_of(trainer, dataset, batch_size, seed, batches_to_shuffle=4, alone=alone)
    return islice(stream, -(-images // batch_size))


def _may_be_read_once(dataset: Any) -> bool:
    # Only those of `datasets` are known to begin anew.
    return isinstance(dataset, IterableDataset) and not isinstance(dataset, datasets.IterableDataset)


def _label_column(trainer: MetaLRTrainer, dataset: Any) -> str:
    columns = getattr(dataset, "column_names", None) or []
    candidates = [*(trainer.args.label_names or []), "labels", "label"]
    return next((name for name in candidates if name in columns), candidates[0])
