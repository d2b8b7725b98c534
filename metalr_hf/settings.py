"""What the settings of learning-rate tuning may be; checked alike for the scheduler and the training arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

META_SOURCES = ("stream", "next_batch")
LOOKAHEADS = ("optimizer", "sgd")
META_MODES = ("train", "eval")
LAYER_GRANULARITIES = ("block", "stage", "tensor")
# Of NumPy.
LARGEST_SEED = 2**32 - 1


def check_settings(
    *,
    hyper_lr: float,
    lr_min: float,
    lr_max: float,
    max_lr_change: float | None,
    meta_source: str,
    meta_every: int,
    tuning_steps: int | None,
    lookahead: str,
) -> None:
    """Raises if a setting of learning-rate tuning is of the wrong type or out of range.

    Args:
        hyper_lr (`float`): Finite and not negative.
        lr_min (`float`): Not negative.
        lr_max (`float`): Above `lr_min`, possibly infinite.
        max_lr_change (`float` or `None`): Above 1.
        meta_source (`str`): `"stream"` or `"next_batch"`.
        meta_every (`int`): 1 or more.
        tuning_steps (`int` or `None`): 1 or more.
        lookahead (`str`): `"optimizer"`, or `"sgd"` with the source `"stream"`.

    Raises:
        TypeError: if a number is not one.
        ValueError: if a value is out of range. Both name the argument and what was given.

    Example:

    ```python
    >>> from metalr_hf.settings import check_settings
    >>> settings = {"lr_min": 0.0, "lr_max": 1.0, "max_lr_change": 2.0, "meta_source": "stream", "meta_every": 1}
    >>> check_settings(hyper_lr=-0.1, tuning_steps=None, lookahead="optimizer", **settings)
    Traceback (most recent call last):
        ...
    ValueError: hyper_lr=-0.1 must be finite and 0 or more; 0 switches tuning off, 0.1 is a good start.

    ```
    """
    check_number("hyper_lr", hyper_lr)
    if not 0 <= hyper_lr < math.inf:
        raise ValueError(
            f"hyper_lr={hyper_lr!r} must be finite and 0 or more; 0 switches tuning off, 0.1 is a good start."
        )
    check_number("lr_min", lr_min)
    check_number("lr_max", lr_max)
    if not 0 <= lr_min <= lr_max:
        raise ValueError(f"lr_min={lr_min!r} and lr_max={lr_max!r} must satisfy 0 <= lr_min <= lr_max.")
    if max_lr_change is not None:
        check_number("max_lr_change", max_lr_change)
        if not max_lr_change > 1:
            raise ValueError(
                f"max_lr_change={max_lr_change!r} must be above 1 (a rate changes at most by this factor), or None for "
                "no trust region."
            )
    check_choice("meta_source", meta_source, META_SOURCES)
    check_choice("lookahead", lookahead, LOOKAHEADS)
    check_count("meta_every", meta_every)
    if tuning_steps is not None:
        to_the_end = "; to tune to the last step, MetaLRTrainingArguments take 0 and MetaLRScheduler takes None"
        check_count("tuning_steps", tuning_steps, to_the_end)
    if lookahead == "sgd" and meta_source == "next_batch":
        raise ValueError(
            'lookahead="sgd" needs meta_source="stream": the next batch\'s gradient is taken after the step that the '
            "optimizer really took."
        )


def check_number(name: str, value: Any) -> None:
    """Raises `TypeError` if a setting is not a number, `ValueError` if it is NaN.

    Args:
        name (`str`): The setting, for the message.
        value (`Any`): What was given.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}.")
    if math.isnan(value):
        raise ValueError(f"{name}={value!r} must be a number, not NaN.")


def check_flag(name: str, value: Any) -> None:
    """Raises `TypeError` if a setting is neither true nor false nor left out, as the text `"no"`, which counts as true.

    Args:
        name (`str`): The setting, for the message.
        value (`Any`): What was given.
    """
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True, False or None, not {type(value).__name__}.")


def check_count(name: str, value: Any, otherwise: str = "") -> None:
    """Raises if a setting is not a whole number of 1 or more.

    Args:
        name (`str`): The setting, for the message.
        value (`Any`): What was given.
        otherwise (`str`, *optional*, defaults to `""`): What else the message says of a number that is too low.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be a whole number, not {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"{name}={value!r} must be 1 or more{otherwise}.")


def check_seed(name: str, value: int) -> None:
    """Raises `ValueError` if a number is no seed.

    Args:
        name (`str`): The setting, for the message.
        value (`int`): What was given.
    """
    if not 0 <= value <= LARGEST_SEED:
        raise ValueError(f"{name}={value!r} must be a whole number from 0 to {LARGEST_SEED}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises `ValueError` if a setting is none of its choices.

    Args:
        name (`str`): The setting, for the message.
        value (`Any`): What was given.
        choices (`tuple[str, ...]`): What may be given.

    Example:

    ```python
    >>> from metalr_hf.settings import check_choice
    >>> check_choice("kind", "bars", ("curves", "heatmap"))
    Traceback (most recent call last):
        ...
    ValueError: kind='bars' must be one of 'curves', 'heatmap'.

    ```
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")


def check_learning_rates(learning_rates: Mapping[str, float], lr_min: float, lr_max: float) -> None:
    """Raises `ValueError` if a start learning rate is outside the bounds.

    Args:
        learning_rates (`Mapping[str, float]`): Layer to start rate.
        lr_min (`float`): Lower bound.
        lr_max (`float`): Upper bound.
    """
    for layer, rate in learning_rates.items():
        if not lr_min <= rate <= lr_max:
            raise ValueError(
                f"The start learning rate {rate:g} of layer {layer!r} is outside the bounds lr_min={lr_min:g} and "
                f"lr_max={lr_max:g}. Change the learning rate or the bounds."
            )


def check_saved_layers(saved: list[str], layers: list[str], where: str = "This") -> None:
    """Raises `ValueError` if the layers of a checkpoint are not those of the run that resumes from it.

    Args:
        saved (`list[str]`): The layers of the checkpoint, in their order.
        layers (`list[str]`): Those of the run.
        where (`str`, *optional*, defaults to `"This"`): What to call the checkpoint.
    """
    if saved != layers:
        raise ValueError(
            f"{where} is a checkpoint of a run with other layers: only there "
            f"{[layer for layer in saved if layer not in layers]}, only here "
            f"{[layer for layer in layers if layer not in saved]}, in another order otherwise. Resume with the same "
            "model, frozen parameters and layer_groups, or start a new run."
        )


def check_saved_optimizer(saved: str, own: str) -> None:
    """Raises `ValueError` if a checkpoint is of a run with another optimizer, whose state is no good to this one.

    Args:
        saved (`str`): Class of the checkpoint's optimizer.
        own (`str`): That of this run's.
    """
    if saved != own:
        raise ValueError(
            f"The checkpoint's optimizer is {saved}, that of this run {own}. Resume with the same `optim`, or start a "
            "new run from the checkpoint's weights."
        )


def check_layer_names(name: str, given: Mapping[str, Any], layers: list[str]) -> None:
    """Raises `ValueError` if a setting names a layer that is not there.

    Args:
        name (`str`): The setting, for the message.
        given (`Mapping[str, Any]`): What was given, by layer.
        layers (`list[str]`): The layers that there are.
    """
    unknown = sorted(set(given) - set(layers))
    if unknown:
        raise ValueError(f"{name} names layers that are not there: {unknown}. The layers are {layers}.")
