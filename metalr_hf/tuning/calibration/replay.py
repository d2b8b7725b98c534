"""The loss where only the head is moved: what the model computes before it is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

# What is noted at most, in bytes. Most models call few parts, but one may call each of its layers by itself.
LARGEST_NOTES = 2**30


class ReplayedLoss:
    """A loss that runs a model's backbone once for all calls in [`~ReplayedLoss.backbone_kept`].

    A calibration walks up a ladder of learning rates of the head while the backbone stays as it is, so that a forward
    pass for each rung would compute the same features again. What every module without a parameter of the head gave
    before the first module with one was called is noted in the first call, and given again in the others. They are
    used only if each module with such a parameter was called, and if with them the first loss comes out again, bit for
    bit: dropout behind a part of the head, or a model that reads its features by hooks, makes a difference, and then
    every pass is run in full. So it is where there would be more than a gibibyte to note.

    Args:
        model (`torch.nn.Module`): The model.
        head (`Iterable[torch.Tensor]`): The parameters of its head.
        loss (`Callable`): Takes nothing and returns the scalar loss of the model, without a graph.

    Attributes:
        replays (`int`): How many calls have not run the backbone.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.calibration.replay import ReplayedLoss
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> images = torch.ones(8, 4)
    >>> loss = ReplayedLoss(model, model[2].parameters(), lambda: model(images).square().mean())
    >>> with torch.no_grad(), loss.backbone_kept():
    ...     first = loss()
    ...     _ = model[2].weight.zero_(), model[2].bias.zero_()
    ...     second = loss()
    >>> float(second), loss.replays
    (0.0, 1)

    ```
    """

    def __init__(self, model: nn.Module, head: Iterable[Tensor], loss: Callable[[], Tensor]):
        ids = {id(p) for p in head}
        self._model, self._loss = model, loss
        self._owners = [m for m in model.modules() if any(id(p) in ids for p in m.parameters(recurse=False))]
        self._others = [m for m in model.modules() if not any(id(p) in ids for p in m.parameters())]
        self._is_kept = self._is_tried = False
        # Those with a parameter of the head that have been called in a pass, and in all passes.
        self._reached: set[nn.Module] = set()
        self._called: set[nn.Module] = set()
        self._outputs: list[tuple[nn.Module, Any]] = []
        self.replays = 0

    def __call__(self) -> Tensor:
        if not (self._is_kept and self._owners):
            return self._loss()
        if not self._is_tried:
            self._is_tried = True
            return self._first()
        if not self._outputs:
            return self._loss()
        self.replays += 1
        return self._again()

    @contextmanager
    def backbone_kept(self) -> Iterator[None]:
        """A context in which the loss is called with other heads, but the same backbone, images and random numbers."""
        self._is_kept = True
        try:
            yield
        finally:
            self._is_kept = self._is_tried = False
            self._outputs = []

    def _first(self) -> Tensor:
        is_inside, room = False, LARGEST_NOTES

        def noted(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal is_inside, room
            if self._reached or is_inside or room < 0:
                return forward(*args, **kwargs)
            is_inside = True
            try:
                output = forward(*args, **kwargs)
            finally:
                is_inside = False
            room -= sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            if room < 0:
                self._outputs = []
            else:
                self._outputs.append((module, _copied(output)))
            return output

        self._called.clear()
        with self._in_place_of_forward(noted):
            loss = self._loss()
        if room < 0 or len(self._called) < len(self._owners) or not self._comes_out_as(loss):
            self._outputs = []
        return loss

    def _comes_out_as(self, loss: Tensor) -> bool:
        try:
            return torch.equal(self._again(), loss)
        except Exception:
            # Such as of a model that misses what its hooks would have noted. In full it has just run.
            return False

    def _again(self) -> Tensor:
        outputs = iter(self._outputs)

        def replayed(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self._reached:
                return forward(*args, **kwargs)
            noted, output = next(outputs)
            if noted is not module:
                raise RuntimeError(f"A {type(module).__name__} was called where it was not before.")
            return _copied(output)

        with self._in_place_of_forward(replayed):
            return self._loss()

    @contextmanager
    def _in_place_of_forward(self, call: Callable[..., Any]) -> Iterator[None]:
        """Has the modules without a parameter of the head run something else, which is given the module's own."""

        def begin(module: nn.Module, _: Any) -> None:
            self._reached.clear()

        def reach(module: nn.Module, _: Any) -> None:
            self._reached.add(module)
            self._called.add(module)

        handles = [self._model.register_forward_pre_hook(begin)]
        handles += [module.register_forward_pre_hook(reach) for module in self._owners]
        own = [module.__dict__.get("forward") for module in self._others]
        try:
            for module in self._others:
                module.forward = partial(call, module, module.forward)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, forward in zip(self._others, own, strict=True):
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.forward = forward


def _copied(output: Any) -> Any:
    # A model may work in place on what a module gave.
    return tree_map_only(Tensor, torch.clone, output)
