"""LRHistory: the learning rate of every layer at every step."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    import pandas as pd


class LRHistory:
    """The learning rate of every layer at every recorded step, with the validation losses and hypergradients.

    Args:
        layers (`Sequence[str]`): Layer names, input side first and the head last.

    Example:

    ```python
    >>> from metalr_hf import LRHistory
    >>> history = LRHistory(["stem", "head"])
    >>> history.append(0, [1e-4, 1e-3], meta_loss=2.3, hypergradients=[-1.0, -4.0])
    >>> history.append(1, [1.25e-4, 1.25e-3])
    >>> history.learning_rates
    array([[0.0001  , 0.001   ],
           [0.000125, 0.00125 ]])

    ```
    """

    def __init__(self, layers: Sequence[str]):
        self.layers = list(layers)
        self._steps: list[int] = []
        # A quarter of the memory of lists.
        self._learning_rates: list[array[float]] = []
        self._meta_losses: list[float] = []
        # By the place of the step among the recorded ones: most steps of a long run are not tuned.
        self._hypergradients: dict[int, list[float]] = {}

    def append(
        self,
        step: int,
        learning_rates: Sequence[float],
        meta_loss: float = math.nan,
        hypergradients: Sequence[float] | None = None,
    ) -> None:
        """Records an optimizer step.

        Args:
            step (`int`): The optimizer step, from 0.
            learning_rates (`Sequence[float]`): The rate that each layer used.
            meta_loss (`float`, *optional*): The validation loss, if there was one.
            hypergradients (`Sequence[float]`, *optional*): ∂L_val/∂α of each layer, if it was tuned.
        """
        if hypergradients is not None:
            self._hypergradients[len(self)] = list(hypergradients)
        self._steps.append(step)
        self._learning_rates.append(array("d", learning_rates))
        self._meta_losses.append(meta_loss)

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def steps(self) -> np.ndarray:
        """The recorded optimizer steps: `(steps,)`, int64."""
        return np.array(self._steps, dtype=np.int64)

    @property
    def learning_rates(self) -> np.ndarray:
        """The rates used, times the schedule's shape: `(steps, layers)`, float64."""
        return self._table(self._learning_rates)

    @property
    def meta_losses(self) -> np.ndarray:
        """The validation losses: `(steps,)`, float64, NaN where there was none."""
        return np.array(self._meta_losses, dtype=np.float64)

    @property
    def hypergradients(self) -> np.ndarray:
        """∂L_val/∂α: `(steps, layers)`, float64, NaN where nothing was tuned."""
        table = np.full((len(self), len(self.layers)), math.nan)
        table[list(self._hypergradients)] = self._table(list(self._hypergradients.values()))
        return table

    def last_row(self, every_layer: bool = False) -> dict[str, float]:
        """The last recorded step as a row of a log.

        Args:
            every_layer (`bool`, *optional*, defaults to `False`): Whether every layer is in it. Trackers group by
                what stands before the slash.

        Returns:
            `dict[str, float]`: `learning_rate`, the geometric mean over the layers; `learning_rate_min` and
            `learning_rate_max`; `meta_loss` if there was a validation loss; of every layer `lr/<layer>` and, if the
            step was tuned, `hypergradient/<layer>`.

        Example:

        ```python
        >>> from metalr_hf import LRHistory
        >>> history = LRHistory(["stem", "head"])
        >>> history.append(0, [0.25, 1.0], meta_loss=2.5)
        >>> history.last_row()
        {'learning_rate': 0.5, 'learning_rate_min': 0.25, 'learning_rate_max': 1.0, 'meta_loss': 2.5}

        ```
        """
        rates = self._learning_rates[-1]
        low, high = min(rates), max(rates)
        mean = math.exp(sum(map(math.log, rates)) / len(rates)) if low > 0 else 0.0
        row = {
            "learning_rate": low if low == high else mean,
            "learning_rate_min": low,
            "learning_rate_max": high,
            "meta_loss": self._meta_losses[-1],
        }
        if every_layer:
            row |= {f"lr/{layer}": rate for layer, rate in zip(self.layers, rates, strict=True)}
            if (hypergradients := self._hypergradients.get(len(self) - 1)) is not None:
                tuned = zip(self.layers, hypergradients, strict=True)
                row |= {f"hypergradient/{layer}": value for layer, value in tuned}
        return {name: value for name, value in row.items() if math.isfinite(value)}

    def to_pandas(self) -> pd.DataFrame:
        """The learning rates as a table: a row per step, a column per layer, the steps as index."""
        import pandas as pd

        return pd.DataFrame(self.learning_rates, columns=self.layers, index=pd.Index(self.steps, name="step"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the learning rates as CSV: `step`, then a column a layer. Every digit is kept.

        Args:
            path (`str` or `os.PathLike`): The file to write. Its folder is made if it is not there.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.to_pandas().to_csv(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LRHistory:
        """Reads what [`~LRHistory.save`] wrote; the file holds no validation losses and hypergradients.

        Args:
            path (`str` or `os.PathLike`): The CSV file.

        Returns:
            [`LRHistory`]

        Raises:
            ValueError: if the file is not such a table.
        """
        import pandas as pd

        try:
            # As text first: which of its float parsers keep the last digit differs between versions of pandas.
            table = pd.read_csv(path, index_col=0, dtype=str)
            rates, steps = table.to_numpy(np.float64), table.index.to_numpy(np.int64)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)} is not a learning-rate history: {error}") from error
        if table.index.name != "step" or not len(table.columns):
            raise ValueError(
                f"{os.fspath(path)} is not a learning-rate history: its first column must be 'step' and the others "
                f"layers, but its columns are {[table.index.name, *table.columns]}."
            )
        history = cls(list(table.columns))
        for step, row in zip(steps.tolist(), rates.tolist(), strict=True):
            history.append(step, row)
        return history

    def state_dict(self) -> dict[str, Any]:
        """Everything, in tensors and plain containers."""
        return {
            "layers": list(self.layers),
            "steps": torch.tensor(self._steps, dtype=torch.int64),
            "learning_rates": torch.from_numpy(self.learning_rates),
            "meta_losses": torch.tensor(self._meta_losses, dtype=torch.float64),
            "tuned": torch.tensor(list(self._hypergradients), dtype=torch.int64),
            "hypergradients": torch.from_numpy(self._table(list(self._hypergradients.values()))),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what [`~LRHistory.state_dict`] gave.

        Raises:
            ValueError: if its layers are others.
        """
        if state_dict["layers"] != self.layers:
            raise ValueError(
                f"This is the history of other layers: {state_dict['layers']}, where this model has {self.layers}."
            )
        self._steps = state_dict["steps"].tolist()
        self._learning_rates = [array("d", row) for row in state_dict["learning_rates"].tolist()]
        self._meta_losses = state_dict["meta_losses"].tolist()
        hypergradients = zip(state_dict["tuned"].tolist(), state_dict["hypergradients"].tolist(), strict=True)
        self._hypergradients = dict(hypergradients)

    def _table(self, rows: Sequence[Sequence[float]]) -> np.ndarray:
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self.layers))
