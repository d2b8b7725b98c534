"""The model card of a run; it states only what the run recorded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .markdown import escape, table
from .usage import example_of, usage

TEMPLATE = Path(__file__).with_name("card_template.md")
# A rate that changed by less than this factor stayed where it was.
MOVED = 1.25
# The Hub's names of metrics.
METRIC_TYPES = {
    "macro_f1": "f1",
    "auroc": "roc_auc",
    "macro_auroc": "roc_auc",
    "r2": "r_squared",
    "pearson": "pearsonr",
}
DATASET_TYPE = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
TIMM_TAGS = ["timm", "transformers"]


@dataclass(frozen=True)
class LayerFacts:
    """How a layer's learning rate changed, without the factor of the schedule.

    Args:
        name (`str`): The layer.
        start (`float`): Its rate at the end of the calibration, or as it was given.
        final (`float`): Its rate at the last step.
        low (`float`): Its lowest rate.
        high (`float`): Its highest rate.

    Example:

    ```python
    >>> from metalr_hf.hub.card import LayerFacts
    >>> layer = LayerFacts("head", start=1e-3, final=2e-3, low=1e-3, high=3e-3)
    >>> layer.factor, layer.direction
    (2.0, 'rose')

    ```
    """

    name: str
    start: float
    final: float
    low: float
    high: float

    @property
    def factor(self) -> float:
        """Final over start; 1 for a layer that never had a rate."""
        return self.final / self.start if self.start > 0 else 1.0

    @property
    def direction(self) -> str:
        """`rose`, `fell` or `stayed`."""
        if self.factor > MOVED:
            return "rose"
        return "fell" if self.factor < 1 / MOVED else "stayed"


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    Args:
        split (`str`): On which images: `"test"`, `"eval"`, or another prefix given to `evaluate`.
        metrics (`Mapping[str, float]`): Metric to value, without prefix.
        class_results (`Sequence[Sequence[object]]`): Class, precision, recall, F1, images.
        step (`int`): The optimizer step of the weights that were measured.
    """

    split: str
    metrics: Mapping[str, float]
    class_results: Sequence[Sequence[object]] = ()
    step: int = 0


@dataclass
class RunFacts:
    """The facts of a run from which its card is written. Unknown ones keep their default and do not appear in the card.

    Args:
        library (`str` or `None`): What loads the model: `"transformers"`, `"timm"` or `"peft"`.
        task (`str` or `None`): The pipeline tag.
        architecture (`str`): Name of the network.
        layers (`Sequence[LayerFacts]`): Input side first, the head last.
        settings (`Mapping[str, object]`): The training set-up, name to value.
        validation (`str`): How validation batches were drawn, in a sentence.
        step (`int`): The optimizer step of the weights.
        tuned (`bool`): Whether the rates were tuned.
        auto_class (`str`): The class of transformers that loads such a model.
        has_own_code (`bool`): Whether the code of the model's class is published with it.
        volume_channels (`int`, *optional*): Of the volumes that a 3-D network takes, for which there is no pipeline.
        reads_nifti (`bool`): Whether the processor that is published with it reads such volumes.
        input_shape (`Sequence[int]`, *optional*): `(channels, height, width)` of an image that the model takes, where
            no image processor was saved with it.
        own_reader (`str`, *optional*): Why images have to be read by this package, which other readers would misread.
        base_model (`str`, *optional*): Hub id of the pretrained model.
        license (`str`, *optional*): Its licence.
        dataset (`str`, *optional*): Hub id of the data set, or its name.
        dataset_on_hub (`bool`): Whether `dataset` is a Hub id.
        classes (`Sequence[str]`): The class names.
        answers (`str`): What the model answers; `{count}` and `{names}` stand for the classes.
        activation (`str`): What makes answers of the logits: `"softmax"`, `"sigmoid"` or `"none"`.
        purpose (`str`): What the card calls the task, if not as the Hub does.
        evaluation ([`Evaluation`], *optional*): The results.
        test_split (`str`, *optional*): What the images of a test are, as for [`tested_on`].
        train_images (`int`, *optional*): Size of the training set.
        tags (`Sequence[str]`): Further tags.
        language (`str`, *optional*): Of the card.
    """

    library: str | None
    task: str | None
    architecture: str
    layers: Sequence[LayerFacts]
    settings: Mapping[str, object]
    validation: str
    step: int = 0
    tuned: bool = True
    auto_class: str = "AutoModelForImageClassification"
    has_own_code: bool = False
    volume_channels: int | None = None
    reads_nifti: bool = False
    input_shape: Sequence[int] | None = None
    own_reader: str | None = None
    base_model: str | None = None
    license: str | None = None
    dataset: str | None = None
    dataset_on_hub: bool = False
    classes: Sequence[str] = ()
    answers: str = "It tells {count} classes apart: {names}"
    activation: str = "softmax"
    purpose: str | None = None
    evaluation: Evaluation | None = None
    test_split: str | None = "test"
    train_images: int | None = None
    tags: Sequence[str] = ()
    language: str | None = None


def model_card(facts: RunFacts) -> ModelCard:
    """Writes the card of a run.

    Args:
        facts ([`RunFacts`]): What the run knows.

    Returns:
        `huggingface_hub.ModelCard`

    Example:

    ```python
    >>> from metalr_hf.hub.card import LayerFacts, RunFacts, model_card
    >>> layers = [LayerFacts("stem", 1e-4, 5e-5, 5e-5, 1e-4), LayerFacts("head", 1e-3, 2e-3, 1e-3, 2e-3)]
    >>> facts = RunFacts("transformers", "image-classification", "ResNet", layers, {"seed": 42}, "")
    >>> card = model_card(facts)
    >>> card.data.library_name, "| head | 1.0e-03 | 2.0e-03 |" in card.text
    ('transformers', True)

    ```
    """
    results = facts.evaluation
    return ModelCard.from_template(
        _card_data(facts),
        template_path=str(TEMPLATE),
        title=escape(_title(facts)),
        introduction=_introduction(facts),
        usage=usage(facts),
        usage_language="bash" if example_of(facts) == "predict" else "python",
        tested_on=results and _tested_on(results, facts),
        results=results and table(["metric", "value"], [(k, f"{v:.4f}") for k, v in results.metrics.items()], "lr"),
        class_results=results
        and results.class_results
        and table(["class", "precision", "recall", "F1", "images"], results.class_results, "lrrrr"),
        layers=table(
            ["layer", "start LR", "final LR", "range", "direction"],
            [
                (x.name, f"{x.start:.1e}", f"{x.final:.1e}", f"{x.low:.1e} – {x.high:.1e}", _direction(x))
                for x in facts.layers
            ],
            "lrrr",
        ),
        reading=facts.tuned and reading(facts.layers),
        settings=table(["setting", "value"], facts.settings.items()),
        validation=facts.validation,
        limits=_limits(facts),
    )


def reading(layers: Sequence[LayerFacts]) -> str:
    """Describes in a paragraph what the learning rates tell about how the layers transfer.

    Args:
        layers (`Sequence[LayerFacts]`): Input side first, the head last.

    Returns:
        `str`: Markdown.

    Example:

    ```python
    >>> from metalr_hf.hub.card import LayerFacts, reading
    >>> layers = [LayerFacts("stem", 1e-4, 5e-5, 5e-5, 1e-4), LayerFacts("head", 1e-3, 2e-3, 1e-3, 2e-3)]
    >>> reading(layers).split(".")[0]
    'Of 2 learning rates, 1 rose, 1 fell'

    ```
    """
    ways = {"rose": "rose", "fell": "fell", "stayed": "stayed within a quarter of the start"}
    counts = {way: sum(layer.direction == way for layer in layers) for way in ways}
    text = f"Of {len(layers)} learning rates, {', '.join(f'{counts[way]} {ways[way]}' for way in ways if counts[way])}."
    factors = [layer.factor for layer in layers]
    if min(factors) > 0 and max(factors) > MOVED * min(factors):
        first, last = (end(layers, key=lambda layer: layer.factor) for end in (max, min))
        mean = _mean(factors)
        text += (
            f" Together they went to {mean:.2g} times their start; measured by that, {escape(first.name)} gained most, "
            f"{first.factor / mean:.2g} times, and {escape(last.name)} least, {last.factor / mean:.2g} times."
        )
    backbone = [layer.final for layer in layers[:-1]]
    if len(backbone) >= 2 and min(*backbone, layers[-1].final) > 0:
        half = len(backbone) // 2
        text += (
            f" At the end the head's was {layers[-1].final / _mean(backbone):.2g} times the backbone's mean, and the "
            f"mean of the backbone's output half {_mean(backbone[half:]) / _mean(backbone[:half]):.2g} times that of "
            "its input half."
        )
    return (
        f"{text} A rate rises where a longer step would have lowered the loss on images that the step had not seen, "
        "and falls where a shorter one would: a low rate suggests that a layer transfers as it is, a high one that it "
        "had to change. That reads one run with one seed, and says nothing of how much a layer matters."
    )


def _mean(rates: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, rates)) / len(rates))


def _direction(layer: LayerFacts) -> str:
    return layer.direction if layer.direction == "stayed" else f"{layer.direction}, ×{layer.factor:.2g}"


def _title(facts: RunFacts) -> str:
    base = facts.base_model.rsplit("/", 1)[-1] if facts.base_model else facts.architecture
    return f"{base} on {facts.dataset}" if facts.dataset else base


def _introduction(facts: RunFacts) -> str:
    purpose = facts.purpose or (facts.task and facts.task.replace("-", " "))
    task = f" for {purpose}" if purpose else ""
    text = f"A model{task}: {escape(facts.architecture)}"
    if facts.base_model:
        text += f", fine-tuned from [{escape(facts.base_model)}](https://huggingface.co/{facts.base_model})"
    if facts.dataset_on_hub:
        text += f" on [{escape(facts.dataset)}](https://huggingface.co/datasets/{facts.dataset})"
    elif facts.dataset:
        text += f" on {escape(facts.dataset)}"
    if facts.train_images:
        text += f", with {facts.train_images:,} training images"
    if facts.classes:
        shown = ", ".join(map(escape, facts.classes[:12]))
        more = f" and {len(facts.classes) - 12} more" if len(facts.classes) > 12 else ""
        text += ". " + facts.answers.format(count=len(facts.classes), names=f"{shown}{more}")
    return f"{text}."


def tested_on(split: str | None) -> str:
    """What results are of, in words.

    Args:
        split (`str`, *optional*): The split that was tested on; `None` for images held out of those to train on.

    Returns:
        `str`

    Example:

    ```python
    >>> from metalr_hf.hub.card import tested_on
    >>> tested_on("validation"), tested_on(None)
    ('the validation split', 'images held out of the training split')

    ```
    """
    return "images held out of the training split" if split is None else f"the {split} split"


def _tested_on(results: Evaluation, facts: RunFacts) -> str:
    names = {"test": tested_on(facts.test_split and escape(facts.test_split)), "eval": "the evaluation set"}
    where = names.get(results.split, f"the set {escape(results.split)}")
    if results.step == facts.step:
        return where
    return f"{where} at optimizer step {results.step}, not with the final weights"


def _limits(facts: RunFacts) -> str:
    text = "The figures above are of one run with one seed" if facts.evaluation else "This run was not evaluated"
    return (
        f"{text}. Images of another origin (another device, stain, centre or population) may be told apart less well, "
        "and nothing here has been checked for use on patients or in any other decision about people."
    )


def _card_data(facts: RunFacts) -> ModelCardData:
    results, index = facts.evaluation, []
    if results is not None and facts.task and facts.dataset and results.step == facts.step:
        index = [
            EvalResult(
                task_type=facts.task,
                dataset_type=facts.dataset if DATASET_TYPE.fullmatch(facts.dataset) else "custom",
                dataset_name=facts.dataset,
                dataset_split=facts.test_split if results.split == "test" else results.split,
                metric_type=METRIC_TYPES.get(name, name),
                metric_name=name,
                metric_value=value,
            )
            for name, value in results.metrics.items()
            if name != "loss" and math.isfinite(value)
        ]
    metrics = results.metrics if results else {}
    own_tags = [facts.task, "metalr", *(TIMM_TAGS if facts.library == "timm" else [])]
    return ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name=facts.library,
        pipeline_tag=facts.task,
        base_model=facts.base_model,
        datasets=[facts.dataset] if facts.dataset and facts.dataset_on_hub else None,
        metrics=sorted({METRIC_TYPES.get(name, name) for name in metrics if name != "loss"}) or None,
        tags=list(dict.fromkeys(tag for tag in [*own_tags, *facts.tags] if tag)),
        model_name=_title(facts) if index else None,
        eval_results=index or None,
    )
