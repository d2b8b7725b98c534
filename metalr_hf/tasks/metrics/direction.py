"""Which figures are the better the lower they are."""

from __future__ import annotations

ERRORS = ("mae", "mse", "rmse", "hausdorff95")


def lower_is_better(name: str) -> bool:
    """Whether the lowest value of a figure is the best one, by its name.

    Args:
        name (`str`): Such as `eval_loss`, `mae` or `eval_mae_age`, which is that of one of several numbers.

    Returns:
        `bool`

    Example:

    ```python
    >>> from metalr_hf.tasks.metrics import lower_is_better
    >>> [lower_is_better(name) for name in ("eval_loss", "mae_age", "eval_accuracy")]
    [True, True, False]

    ```
    """
    return name.endswith("loss") or any(part in ERRORS for part in name.split("_"))
