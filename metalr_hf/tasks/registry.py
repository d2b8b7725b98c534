"""The registry in which tasks are found by name."""

from __future__ import annotations

from typing import Any

from ..messages import did_you_mean
from .base import Task

TASKS: dict[str, Task] = {}


def register_task(name: str) -> Any:
    """Registers a task, so that `metalr-hf train --task` and `compare --task` find it.

    Args:
        name (`str`): What it is called.

    Returns:
        `Callable`: a decorator of a subclass of [`Task`] that is made without arguments.

    Example:

    ```python
    >>> from metalr_hf.tasks import TASKS, register_task
    >>> from metalr_hf.tasks.classification import Classification
    >>> @register_task("upright")
    ... class Upright(Classification):
    ...     card_sentence = "It says whether an image stands upright: {names}"
    >>> TASKS["upright"].metric
    'accuracy'

    ```
    """

    def register(kind: type[Task]) -> type[Task]:
        TASKS[name] = kind()
        return kind

    return register


def task_of(config: Any) -> Task:
    """Finds the task that a saved model was trained for.

    Args:
        config (`transformers.PreTrainedConfig`): Its configuration.

    Returns:
        [`Task`]

    Raises:
        ValueError: if it is none that is known.

    Example:

    ```python
    >>> from transformers import ViTConfig
    >>> from metalr_hf.tasks.registry import task_of
    >>> type(task_of(ViTConfig(architectures=["ViTForImageClassification"], problem_type="regression"))).__name__
    'Regression'

    ```
    """
    found = next((task for task in TASKS.values() if task.made(config)), None)
    if found is None:
        kind = ", ".join(getattr(config, "architectures", None) or [type(config).__name__])
        raise ValueError(f"No task is known for a model like this ({kind}). Name it with --task: {', '.join(TASKS)}.")
    return found


def get_task(name: str) -> Task:
    """Finds a task.

    Args:
        name (`str`): Name of a registered task.

    Returns:
        [`Task`]

    Raises:
        ValueError: if there is none of that name.

    Example:

    ```python
    >>> from metalr_hf.tasks import get_task
    >>> get_task("segmentation").metric
    'dice'

    ```
    """
    if name not in TASKS:
        hint = did_you_mean(name, TASKS, f"Tasks: {', '.join(TASKS)}.")
        raise ValueError(f"task={name!r} is no task.{hint} Your own is registered with metalr_hf.tasks.register_task.")
    return TASKS[name]
