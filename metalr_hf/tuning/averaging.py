"""An average of the weights along a run, in any PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .sharding import local, reshard, saved, shard_of

POLYNOMIAL = "polynomial"
POLYNOMIAL_ETA = 3.0


def averaging_share(kind: str | float) -> Callable[[int], float]:
    """How much of a step's weights goes into the average.

    `"polynomial"` is the polynomial-decay averaging of Shamir and Zhang 2013 with η = 3: (η + 1) / (t + η) at step t.
    Step s weighs about as s to the power of η, so that the average is always over the same last share of the steps (a
    fifth of them back, in the mean), however many there will be. A number is the decay of an exponential
    moving average: 1 - decay, and more in the first steps, min(decay, (1 + t) / (10 + t)), as TensorFlow's and timm's.

    Args:
        kind (`str` or `float`): `"polynomial"`, or a decay in (0, 1).

    Returns:
        `Callable[[int], float]`: the step, 1 the first, to the share.

    Raises:
        ValueError: if it is neither.

    Example:

    ```python
    >>> from metalr_hf.tuning.averaging import averaging_share
    >>> [round(averaging_share("polynomial")(step), 3) for step in (1, 10, 100)]
    [1.0, 0.308, 0.039]
    >>> [round(averaging_share(0.9)(step), 3) for step in (1, 10, 100)]
    [1.0, 0.45, 0.1]

    ```
    """
    if kind == POLYNOMIAL:
        return lambda step: (POLYNOMIAL_ETA + 1) / (step + POLYNOMIAL_ETA)
    try:
        decay = float(kind)
    except (TypeError, ValueError):
        decay = -1.0
    if not 0 < decay < 1:
        raise ValueError(
            f'average_weights={kind!r} must be "{POLYNOMIAL}", or the decay of an exponential moving average, such as '
            '0.99; in training arguments, "none" switches the average off.'
        )
    return lambda step: 1.0 if step == 1 else 1 - min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """A running average of trained parameters and batch-norm statistics.

    Learning rates that stay up leave the last weights wherever the noise of the last steps has thrown them. An average
    over the last part of the run is free of it, as the end of a decay is, and can be taken at any moment. The average
    is held in float32, or in the parameters' own type where that is wider. `torch.optim.swa_utils.AveragedModel` copies
    the whole model and averages in its own type; this holds what is trained and nothing else.

    Args:
        model (`torch.nn.Module`): The model.
        kind (`str` or `float`, *optional*, defaults to `"polynomial"`): See [`averaging_share`].
        parameters (`Iterable[torch.Tensor]`, *optional*): The parameters to average, by default those of the model that
            require gradients. Give them if some of them are thawed later.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning import WeightAverage
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> average = WeightAverage(model)
    >>> for step in range(10):
    ...     model(torch.randn(8, 2)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     average.update()  # after the scheduler's step, if there is one
    >>> last = model.weight.clone()
    >>> with average.applied():  # to evaluate or to save
    ...     torch.equal(model.weight, last)
    False
    >>> torch.equal(model.weight, last)
    True

    ```
    """

    def __init__(
        self, model: nn.Module, kind: str | float = POLYNOMIAL, parameters: Iterable[Tensor] | None = None
    ) -> None:
        self.share = averaging_share(kind)
        self.steps = 0
        wanted = None if parameters is None else {id(p) for p in parameters}
        self._looks_for_thawed = parameters is None
        self._parameters = {
            name: p for name, p in model.named_parameters() if (p.requires_grad if wanted is None else id(p) in wanted)
        }
        self._norms = {name: norm for name, norm in model.named_modules() if has_statistics(norm)}
        self._model = model
        self._average: dict[str, Tensor] = {}
        # Of the weights while the average is in their place.
        self._weights: dict[str, Tensor] = {}
        self._estimated_at = 0
        self._statistics: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights as they are now into the average. Call it after each optimizer step.

        Raises:
            ValueError: if a parameter is trained that was frozen when the average was made.
        """
        if self._looks_for_thawed:
            self._refuse_thawed()
        self.steps += 1
        live = self._live()
        if self.steps == 1:
            self._average = {name: value.to(_wide(value), copy=True) for name, value in live.items()}
            return
        share = self.share(self.steps)
        # All at once where the types are the same, without a copy of the weights.
        same = [name for name, value in live.items() if value.dtype == self._average[name].dtype]
        if same:
            torch._foreach_lerp_([self._average[name] for name in same], [live[name] for name in same], share)
        for name in live.keys() - same:
            self._average[name].lerp_(live[name].to(self._average[name].dtype), share)

    def _refuse_thawed(self) -> None:
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and name not in self._parameters:
                raise ValueError(
                    f"{name!r} is trained, but was frozen when the average was made, which would leave it out. Pass "
                    "parameters=..., all that are ever trained, or make a new average now."
                )

    def restart(self) -> None:
        """Forgets the average, for a run that begins anew."""
        self.steps, self._estimated_at, self._average = 0, 0, {}

    def copy_to_model(
        self, forwards: Callable[[], None] | None = None, refine: Callable[[], None] | None = None
    ) -> None:
        """Puts the average in the place of the weights. Before the first update nothing changes.

        Args:
            forwards (`Callable`, *optional*), refine (`Callable`, *optional*): See [`~WeightAverage.applied`].
        """
        if not self.steps:
            return
        self._put(self._average)
        if forwards is not None and self._norms:
            if self._estimated_at != self.steps:
                with estimated_statistics(self._model):
                    forwards()
                self._estimated_at = self.steps
                self._statistics = {name: value.clone() for name, value in self._buffers().items()}
            _copy(self._buffers(), self._statistics)
        if refine is not None:
            refine()

    @contextmanager
    def applied(
        self, forwards: Callable[[], None] | None = None, refine: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """A context in which the model's weights are the average. Contexts may be nested.

        Args:
            forwards (`Callable`, *optional*):
                Takes nothing and lets a few training batches pass through the model, from which the statistics of
                batch norm are estimated anew. Without it they are averaged along, which is cheap, but they are those of
                the weights of the steps and not those of the average. Called once a step, and not for a model without
                batch norm.
            refine (`Callable`, *optional*):
                Takes nothing and improves on the averaged parameters in place.
        """
        if self._weights or not self.steps:
            yield
            return
        self._weights = {name: value.clone() for name, value in self._live().items()}
        try:
            self.copy_to_model(forwards, refine)
            yield
        finally:
            self._put(self._weights)
            self._weights = {}

    def state_dict(self) -> dict[str, Any]:
        """The average, and the weights that training goes on from.

        Where parameters are sharded, all processes have to call it, and each gets whole ones, on the CPU.
        """
        average, weights = (self._laid_out(saved, part) for part in (self._average, self._weights or self._live()))
        return {"steps": self.steps, "average": average, "weights": weights}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what [`~WeightAverage.state_dict`] gave, the model's own weights among it.

        Args:
            state_dict (`Mapping`): The state.

        Raises:
            ValueError: if it is of other parameters.
        """
        live, weights = self._live(), state_dict["weights"]
        if weights.keys() != live.keys():
            other = sorted(weights.keys() ^ live.keys())
            raise ValueError(f"The saved average is of other parameters: {other[0]} and {len(other) - 1} more differ.")
        self._put(self._laid_out(shard_of, weights))
        average = self._laid_out(shard_of, state_dict["average"])
        self._average = {name: value.to(live[name].device, copy=True) for name, value in average.items()}
        self.steps, self._estimated_at = state_dict["steps"], 0

    def _live(self) -> dict[str, Tensor]:
        # Asked for anew: moving a model to a device replaces its buffers.
        return {name: local(p) for name, p in self._parameters.items()} | self._buffers()

    def _put(self, values: Mapping[str, Tensor]) -> None:
        _copy(self._live(), values)
        reshard(self._model)

    def _laid_out(self, lay_out: Callable[[Tensor, Tensor], Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        of = self._parameters
        return {name: lay_out(value, of[name]) if name in of else value for name, value in values.items()}

    def _buffers(self) -> dict[str, Tensor]:
        buffers = ("running_mean", "running_var")
        return {f"{name}.{buffer}": getattr(norm, buffer) for name, norm in self._norms.items() for buffer in buffers}


@contextmanager
def estimated_statistics(model: nn.Module) -> Iterator[None]:
    """A context whose forwards estimate the statistics of batch norm anew, as plain means over their batches.

    As `torch.optim.swa_utils.update_bn`, but dropout is off, and a batch norm that stays in eval mode when the model is
    put into train mode keeps what it has.

    Args:
        model (`torch.nn.Module`): The model.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.averaging import estimated_statistics
    >>> norm = torch.nn.BatchNorm1d(2)
    >>> with estimated_statistics(norm):
    ...     for shift in (1.0, 3.0):
    ...         _ = norm(torch.zeros(4, 2) + shift)
    >>> norm.running_mean
    tensor([2., 2.])

    ```
    """
    training = [module.training for module in model.modules()]
    model.train()
    norms: list[Any] = [module for module in model.modules() if has_statistics(module) and module.training]
    model.eval()
    momenta, counts = [norm.momentum for norm in norms], [norm.num_batches_tracked for norm in norms]
    try:
        for norm in norms:
            norm.train()
            # A cumulative mean, counted from nothing.
            norm.momentum, norm.num_batches_tracked = None, torch.zeros_like(norm.num_batches_tracked)
        with torch.no_grad():
            yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
        for module, flag in zip(model.modules(), training, strict=True):
            module.training = flag


def has_statistics(module: nn.Module) -> bool:
    """Whether a module is a batch norm that keeps running statistics.

    Args:
        module (`torch.nn.Module`): The module itself; those within it do not count.

    Returns:
        `bool`
    """
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _wide(tensor: Tensor) -> torch.dtype:
    # In half precision a small share of a small difference would be rounded away.
    return torch.promote_types(tensor.dtype, torch.float32)


@torch.no_grad()
def _copy(to: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    if values:
        torch._foreach_copy_([to[name] for name in values], list(values.values()))
