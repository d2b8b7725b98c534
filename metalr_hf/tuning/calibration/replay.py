"""The loss where only the head is moved: what the model computes before it is computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from ..contexts import preserve_random_state

# What is noted at most, in bytes. Most models call few parts, but one may call each of its layers by itself.
LARGEST_NOTES = 2**30


class Note(NamedTuple):
    """What a module was given and what it gave.

    Args:
        module (`torch.nn.Module`): The module.
        given (`tuple`): Its positional arguments, and those by keyword.
        output (`Any`): What it returned.
    """

    module: nn.Module
    given: tuple[Any, Any]
    output: Any

    @property
    def size(self) -> float:
        """In bytes; infinite if that cannot be told, as of sparse tensors."""
        leaves = [leaf for leaf in tree_leaves((self.given, self.output)) if isinstance(leaf, Tensor)]
        return sum(leaf.nbytes if leaf.layout is torch.strided else math.inf for leaf in leaves)


class ReplayedLoss:
    """A loss that runs a model's backbone once for all calls in [`~ReplayedLoss.backbone_kept`].

    A calibration walks up a ladder of learning rates of the head while the backbone stays as it is, so that a forward
    pass for each rung would compute the same features again. What every module without a parameter of the head was
    given and gave, before the first module with one was called, is noted in the first call; in the others it gives the
    same again. A pass is run in full, and so are those after it, where a module is given something else than before,
    as of a loss that calls the model again with what the head has answered. All are if with the notes the first loss,
    or what the head was given, does not come out again, bit for bit, if not each module with a parameter of the head
    was called, or if there would be more than a gibibyte to note.

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
        self._device = next((p.device for p in model.parameters()), None)
        # Since the model was called: whether a module with a parameter of the head has been.
        self._is_reached = False
        # In the whole pass: all of those that have been, and what the first one was given each time.
        self._called: set[nn.Module] = set()
        self._given: list[Any] = []
        self._notes: list[Note] = []
        self.replays = 0

    def __call__(self) -> Tensor:
        if not (self._is_kept and self._owners):
            return self._loss()
        if not self._is_tried:
            self._is_tried = True
            return self._first()
        loss = self._again() if self._notes else None
        if loss is None:
            return self._loss()
        self.replays += 1
        return loss

    @contextmanager
    def backbone_kept(self) -> Iterator[None]:
        """A context in which the loss is called with other heads, but the same backbone, images and random numbers."""
        self._is_kept = True
        try:
            yield
        finally:
            self._is_kept = self._is_tried = False
            self._notes, self._given = [], []

    def _first(self) -> Tensor:
        is_inside, room = False, float(LARGEST_NOTES)

        def noted(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal is_inside, room
            if self._is_reached or is_inside or room < 0:
                return forward(*args, **kwargs)
            # A module may work in place on what it is given.
            given = _copied((args, kwargs))
            is_inside = True
            try:
                output = forward(*args, **kwargs)
            finally:
                is_inside = False
            self._notes.append(Note(module, given, _copied(output)))
            room -= self._notes[-1].size
            if room < 0:
                self._notes = []
            return output

        # So that it is tried with the random numbers that the other passes have.
        with preserve_random_state(self._device), self._in_place_of_forward(noted):
            loss = self._loss()
        given = self._given
        again = self._again() if len(self._called) == len(self._owners) else None
        if again is None or not torch.equal(again, loss) or not _are_equal(self._given, given):
            self._notes = []
        return loss

    def _again(self) -> Tensor | None:
        """The loss by the notes; `None`, and there are no notes any more, if they are of no use."""
        notes = iter(self._notes)

        def replayed(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self._is_reached:
                return forward(*args, **kwargs)
            note = next(notes, None)
            if note is None or note.module is not module or not _are_equal(note.given, (args, kwargs)):
                raise RuntimeError(f"A {type(module).__name__} was called in another way than before.")
            return _copied(note.output)

        with preserve_random_state(self._device), self._in_place_of_forward(replayed):
            try:
                loss = self._loss()
            except Exception:
                # Such as of a model that misses what its hooks would have noted. In full it has run before.
                loss = None
        if loss is None or next(notes, None) is not None:
            self._notes = []
            return None
        return loss

    @contextmanager
    def _in_place_of_forward(self, call: Callable[..., Any]) -> Iterator[None]:
        """Has the modules without a parameter of the head run something else, which is given the module's own."""
        self._is_reached, self._called, self._given = False, set(), []

        def begin(module: nn.Module, args: Any) -> None:
            self._is_reached = False

        def reach(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._is_reached:
                self._given.append(_copied((args, kwargs)))
            self._is_reached = True
            self._called.add(module)

        handles = [self._model.register_forward_pre_hook(begin)]
        handles += [module.register_forward_pre_hook(reach, with_kwargs=True) for module in self._owners]
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


def _copied(values: Any) -> Any:
    # A model may work in place on what a module gave.
    return tree_map_only(Tensor, torch.clone, values)


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two containers hold the same, tensors bit for bit."""
    (values, structure), (others, other_structure) = tree_flatten(one), tree_flatten(other)
    return structure == other_structure and all(map(_is_same, values, others))


def _is_same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        kinds = [(tensor.layout, tensor.dtype, tensor.device) for tensor in (value, other)]
        return kinds[0] == kinds[1] and value.layout is torch.strided and torch.equal(value, other)
    return value is other or (isinstance(value, int | float | str) and value == other)
