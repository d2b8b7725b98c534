"""What a task is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel, Trainer
from transformers.trainer_utils import PredictionOutput

from ..data.files import read_image
from ..data.intensity import VOI, channels_of, window_of
from ..data.listing import ImageList, list_images
from ..data.loading import DataArguments
from ..data.splits import ImageSplits, Splits
from ..data.transforms import (
    Transform,
    load_image_processor,
    load_saved_processor,
    model_input,
    pixels_at_test,
    prepare_splits,
)
from ..messages import did_you_mean
from ..models.loading import ModelArguments, load_config, naming_the_model
from ..models.probe import check_input

# Those of Trainer are made for longer runs on more images: 8 a step, and a first loss in the log at step 500.
LOGGING: Mapping[str, Any] = {"logging_steps": 10}
DEFAULT_ARGUMENTS: Mapping[str, Any] = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    **LOGGING,
}
# Of a run that names neither a model nor a data set.
DEMO_ARGUMENTS: Mapping[str, Any] = {
    # Too low on purpose, and of no consequence: that it makes no difference is what the demo shows.
    "learning_rate": 1e-4,
    "num_train_epochs": 10.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "max_train_samples": 500,
    "logging_steps": 16,
    "save_strategy": "epoch",
    "save_total_limit": 2,
}


class Task(ABC):
    """What a model is to learn: rows, network, inputs, loss, metrics, and what the card says of it.

    A further task is a further class like this, in a file of its own, given a name with
    [`~metalr_hf.tasks.registry.register_task`]. The command line, `compare` and the model card ask it for everything
    that is not the same for all tasks.

    Attributes:
        pipeline_tag (`str`): The Hub's name of the task, such as `"image-classification"`.
        data_arguments (`type`): [`DataArguments`], or a subclass with the arguments that only this task has.
        training_arguments (`Mapping[str, Any]`): What `TrainingArguments` have to say for this task.
        default_arguments (`Mapping[str, Any]`): What they say where the user does not.
        demo_name (`str`): What a comparison calls the images that are trained on where no data set is named.
        demo_description (`str`): What the card calls them.
        demo_model_name (`str`): What a comparison calls the model that is trained where none is named.
        demo_arguments (`Mapping[str, Any]`): Arguments of a run that names neither a model nor a data set.
        demo_augment (`str`): Augmentation of the images that are trained on where no data set is named.
        default_image_size (`int`, *optional*): Height and width of images where a data set but no model is named.
        purpose (`str`, *optional*): What the card calls the task, where that says more than the Hub's name of it.
        card_sentence (`str`): What the model answers; `{count}` and `{names}` stand for the classes.
        activation (`str`): What makes answers of the logits: `"softmax"`, `"sigmoid"` or `"none"`.
        auto_class (`type`): The class of transformers that loads a trained model.
        metric (`str`): The key of [`~Task.score`] that says how good a run is; higher is better.
        scores (`tuple[str, ...]`): All its keys that can say so.
    """

    pipeline_tag: ClassVar[str]
    data_arguments: ClassVar[type[DataArguments]] = DataArguments
    training_arguments: ClassVar[Mapping[str, Any]] = {}
    default_arguments: ClassVar[Mapping[str, Any]] = DEFAULT_ARGUMENTS
    demo_name: ClassVar[str] = "demo"
    demo_description: ClassVar[str] = "images that come with the package"
    demo_model_name: ClassVar[str] = "EfficientNet-Lite0"
    demo_arguments: ClassVar[Mapping[str, Any]] = DEMO_ARGUMENTS
    demo_augment: ClassVar[str] = "none"
    default_image_size: ClassVar[int | None] = 224
    purpose: ClassVar[str | None] = None
    card_sentence: ClassVar[str] = "It tells {count} classes apart: {names}"
    activation: ClassVar[str] = "softmax"
    auto_class: ClassVar[Any] = AutoModelForImageClassification
    metric: ClassVar[str] = "accuracy"
    scores: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def load_splits(self, data: Any, *, seed: int = 42, keep_columns: Sequence[str] = ()) -> ImageSplits:
        """Reads the rows and checks them.

        Args:
            data ([`DataArguments`]): Which data set, columns and splits; of the class in `data_arguments`.
            seed (`int`, *optional*, defaults to 42): Of the held-out share and of the subset.
            keep_columns (`Sequence[str]`, *optional*): Other columns to keep.

        Returns:
            [`ImageSplits`]: with the columns `image` and `label`.

        Raises:
            FileNotFoundError, ValueError: if there are no such rows, or some of them cannot be learned from.
        """

    def for_data(self, folder: str | None) -> Task:
        """The task that is meant where these data are given.

        Args:
            folder (`str`, *optional*): The local folder of the data, where they are in one.

        Returns:
            [`Task`]: itself by default.
        """
        return self

    def model_arguments(self, arguments: ModelArguments, splits: Any) -> ModelArguments:
        """Adds what the rows say about the network, such as the number of channels.

        Args:
            arguments ([`ModelArguments`]): Which model.
            splits ([`ImageSplits`]): What [`~Task.load_splits`] gave.

        Returns:
            [`ModelArguments`]: for [`~Task.load_model`] and [`~Task.load_processor`]; the same by default.
        """
        return arguments

    @abstractmethod
    def load_model(
        self,
        arguments: ModelArguments,
        id2label: Mapping[int, str],
        image_size: int | None = None,
        num_channels: int | None = None,
    ) -> PreTrainedModel:
        """Makes the network, pretrained, with a head for the classes.

        Args:
            arguments ([`ModelArguments`]): Which model.
            id2label (`Mapping[int, str]`): Class number to class name.
            image_size (`int`, *optional*): Height and width of its input in pixels; by default its own.
            num_channels (`int`, *optional*): How many channels its images have; by default its own number.

        Returns:
            `transformers.PreTrainedModel`: with a fresh head if the pretrained one is for other classes.

        Raises:
            FileNotFoundError: if there is no such model, or no network to fetch it.
            ValueError: if it cannot do this task.
        """

    def load_processor(
        self, arguments: ModelArguments, model: PreTrainedModel, image_size: int | None = None
    ) -> BaseImageProcessor:
        """Loads the image processor that belongs to the model.

        Args:
            arguments ([`ModelArguments`]): Which model.
            model (`transformers.PreTrainedModel`): What [`~Task.load_model`] gave.
            image_size (`int`, *optional*): Height and width of the output in pixels; by default the processor's own.

        Returns:
            `transformers.BaseImageProcessor`

        Raises:
            FileNotFoundError: if there is none, or no network to fetch it.
            ValueError: if the model cannot take what it gives.
        """
        name = arguments.model_name_or_path
        with naming_the_model(name, "image processor"):
            processor = self.make_processor(model, name, image_size, trust_remote_code=arguments.trust_remote_code)
        check_input(model, model_input(processor), image_size)
        return processor

    def make_processor(
        self, model: PreTrainedModel, name: str | None, image_size: int | None, **kwargs: Any
    ) -> BaseImageProcessor:
        """What [`~Task.load_processor`] checks: [`~metalr_hf.data.transforms.load_image_processor`] by default.

        Args:
            model (`transformers.PreTrainedModel`): What [`~Task.load_model`] gave.
            name (`str`, *optional*): Hub id or folder.
            image_size (`int`, *optional*): Height and width of the output in pixels; by default the processor's own.
            **kwargs: To `AutoImageProcessor.from_pretrained`.

        Returns:
            `transformers.BaseImageProcessor`
        """
        return load_image_processor(model, name, image_size, **kwargs)

    @abstractmethod
    def transforms(self, splits: Any, processor: BaseImageProcessor, augment: str) -> tuple[Transform, Transform]:
        """How rows become inputs of the model.

        Args:
            splits ([`ImageSplits`]): What [`~Task.load_splits`] gave.
            processor (`transformers.BaseImageProcessor`): The model's image processor.
            augment (`str`): Augmentation of the training images: `none`, `flip`, `crop` or `crop_flip`.

        Returns:
            `tuple[Callable, Callable]`: columns to columns, for the training images and for all others.
        """

    @abstractmethod
    def trainer_arguments(self, class_names: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
        """What the Trainer needs for this task.

        Args:
            class_names (`Sequence[str]`): Name of class 0, 1, ...
            metrics (`Sequence[str]`): Metrics of the evaluation.

        Returns:
            `dict[str, Any]`: `data_collator`, `compute_metrics` and, where they are other than Trainer's,
                `compute_loss_func` and `preprocess_logits_for_metrics`.
        """

    def fit(self, model: nn.Module, rows: Any, processor: BaseImageProcessor, data: Any) -> dict[str, Any]:
        """Fits to the rows that are trained on what depends on them, such as units or weights in the loss.

        Args:
            model (`torch.nn.Module`): What is trained; it may be changed.
            rows (`datasets.Dataset` or `datasets.IterableDataset`): To train on, with the columns `image` and `label`.
            processor (`transformers.BaseImageProcessor`): The model's image processor.
            data ([`DataArguments`]): The arguments that the rows were loaded with.

        Returns:
            `dict[str, Any]`: further arguments of the Trainer, in place of those of [`~Task.trainer_arguments`]
                that have the same name. None by default.

        Raises:
            ValueError: if that is not possible with these rows or this model.
        """
        return {}

    def measure(self, trainer: Trainer, rows: Any) -> PredictionOutput:
        """Measures the test rows of a comparison.

        Args:
            trainer (`transformers.Trainer`): After training.
            rows (`datasets.Dataset`): Prepared, without augmentation.

        Returns:
            `PredictionOutput`: for [`~Task.score`]; what `Trainer.predict` gives by default.
        """
        return trainer.predict(rows)

    @abstractmethod
    def score(self, output: PredictionOutput, class_names: Sequence[str]) -> dict[str, Any]:
        """What a comparison keeps of a run: figures of the test rows, rounded to six digits.

        Args:
            output (`PredictionOutput`): What [`~Task.measure`] gave.
            class_names (`Sequence[str]`): Name of class 0, 1, ...

        Returns:
            `dict`: `test_loss`, the key that `metric` names, and others; that figure is `None` where the outputs are
                not finite.
        """

    def check_metric(self, name: str) -> None:
        """Checks that runs can be compared by a metric.

        Args:
            name (`str`): Its name.

        Raises:
            ValueError: if it is none of `scores`; names the near ones.
        """
        if name not in (scores := self.scores or (self.metric,)):
            hint = did_you_mean(name, scores, f"There are: {', '.join(scores)}.")
            raise ValueError(f"metric={name!r} is not one that says how good a run of this task is.{hint}")

    def prepare(self, splits: Splits, processor: BaseImageProcessor, augment: str, *, seed: int = 42) -> Splits:
        """Turns rows into inputs of the model at the moment they are read.

        Args:
            splits ([`ImageSplits`]): What [`~Task.load_splits`] gave.
            processor (`transformers.BaseImageProcessor`): The model's image processor.
            augment (`str`): Augmentation of the training images: `none`, `flip`, `crop` or `crop_flip`.
            seed (`int`, *optional*, defaults to 42): Of the shuffling of streams.

        Returns:
            [`ImageSplits`]: rows of `pixel_values` and `labels`.
        """
        return prepare_splits(splits, *self.transforms(splits, processor, augment), seed)

    def made(self, config: Any) -> bool:
        """Whether a saved model answers as those of this task do.

        Args:
            config (`transformers.PreTrainedConfig`): Its configuration.

        Returns:
            `bool`
        """
        return False

    def load_trained(self, arguments: ModelArguments) -> tuple[PreTrainedModel, BaseImageProcessor]:
        """Loads a model that has been trained, with its own head and the image processor that it was saved with.

        Args:
            arguments ([`ModelArguments`]): Which model.

        Returns:
            `tuple`: the model and its image processor.

        Raises:
            FileNotFoundError: if there is none, or no network to fetch it.
            ValueError: if it is there and cannot be loaded.
        """
        name, auto_class = str(arguments.model_name_or_path), self.auto_class
        with naming_the_model(name, "model"):
            config = load_config(name, trust_remote_code=arguments.trust_remote_code)
            model = auto_class.from_pretrained(name, config=config, trust_remote_code=arguments.trust_remote_code)
        with naming_the_model(name, "image processor"):
            return model, load_saved_processor(model, name, trust_remote_code=arguments.trust_remote_code)

    def list_images(
        self,
        sources: Sequence[str],
        config: Any,
        split: str | None = None,
        image_column_name: str | None = None,
        leave_out: str | None = None,
    ) -> ImageList:
        """Lists the images that a model is to predict.

        Args:
            sources (`Sequence[str]`): Files and folders, or one data set.
            config (`transformers.PreTrainedConfig`): The configuration of the model.
            split (`str`, *optional*): Of a data set; by default all.
            image_column_name (`str`, *optional*): Of a data set; by default the only one.
            leave_out (`str`, *optional*): A folder whose files are not listed.

        Returns:
            [`~metalr_hf.data.listing.ImageList`]

        Raises:
            FileNotFoundError: if there are no images.
            ValueError: if there is no such split or column.
        """
        return list_images(sources, split, image_column_name, leave_out)

    def read(self, entry: Any, processor: BaseImageProcessor) -> tuple[Tensor, Any]:
        """Reads an image as the model saw those that it was tested on.

        Args:
            entry (`Mapping`, or a list of these): `bytes` and `path` of its file, or of its channels.
            processor (`transformers.BaseImageProcessor`): The image processor that the model was saved with.

        Returns:
            `tuple[torch.Tensor, Any]`: the model's input, and what [`~Task.answers`] has to know of the image: by
                default its size in the file.

        Raises:
            Exception: whatever there is to say of a file that cannot be read.
        """
        window = window_of(processor)
        image: Any = read_image(entry, voi=window is not None and window.source == VOI, channels=channels_of(processor))
        size = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
        return pixels_at_test(image, processor), size

    def answer_columns(self, class_names: Sequence[str]) -> list[str]:
        """The columns of a table of predictions.

        Args:
            class_names (`Sequence[str]`): Name of class 0, 1, ...

        Returns:
            `list[str]`
        """
        raise ValueError(f"{type(self).__name__} predicts nothing: it has no answer_columns and answers.")

    def answers(self, logits: Tensor, class_names: Sequence[str], sources: Sequence[Any]) -> list[dict[str, Any]]:
        """What a model says of a batch of images.

        Args:
            logits (`torch.Tensor`): What it returned.
            class_names (`Sequence[str]`): Name of class 0, 1, ...
            sources (`Sequence[Any]`): What [`~Task.read`] told of the images.

        Returns:
            `list[dict[str, Any]]`: of each image a value for each of [`~Task.answer_columns`]; a mask is saved as a
                file, whose name takes its place: an array as PNG, a `nibabel.Nifti1Image` as NIfTI.
        """
        raise ValueError(f"{type(self).__name__} predicts nothing: it has no answer_columns and answers.")
