"""The look-ahead: the optimizer step just taken, the validation gradient after it, one inner product per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..contexts import preserve_random_state
from ..sharding import local, shard_of, shards, whole
from .displacement import Backwards, StepFromState, dot, step_options
from .validation import clear_gradients, validation_gradient


class LookAhead:
    """One optimizer step, kept adjustable until its learning rates are final.

    The step moved the parameters of layer j from θ_j to θ̂_j = θ_j + Δ_j, with Δ_j = α_j u_j and u_j independent of
    the learning rate α_j. So the derivative of a loss at θ̂ with respect to α_j is one inner product,
    ∂L/∂α_j = ⟨∇_{θ_j} L(θ̂), Δ_j⟩ / α_j, and the step with another rate α'_j ends at θ̂_j + (α'_j / α_j - 1) Δ_j.

    Only parameters that have a gradient when the step begins are noted: the others are not moved by it. Where the
    optimizer's state tells Δ (Adam, AdamW, SGD with momentum) it is read off that. Otherwise one copy of the parameters
    is kept, which holds θ while the step is under way and -Δ = θ - θ̂ afterwards, and is used again by the next.

    Args:
        optimizer (`torch.optim.Optimizer`, *optional*): Whose steps they are, not wrapped. Without it copies are taken.

    Example:

    ```python
    >>> import torch
    >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1)
    >>> look_ahead = LookAhead()
    >>> (weight**2).sum().backward()
    >>> look_ahead.before_step([[weight]])
    >>> optimizer.step()  # θ̂ = 2 - 0.1 · 4
    >>> look_ahead.after_step()
    >>> optimizer.zero_grad()
    >>> (weight**2).sum().backward()
    >>> look_ahead.inner_products()  # ⟨∇L(θ̂), Δ⟩ = 3.2 · -0.4
    tensor([-1.2800])
    >>> look_ahead.rescale([2.0])
    >>> weight.data  # 2 - 0.2 · 4
    tensor([1.2000])

    ```
    """

    def __init__(self, optimizer: Optimizer | None = None) -> None:
        self.optimizer = optimizer
        self.parameters: list[Tensor] = []
        # This process's part of every parameter; the whole one unless it is sharded.
        self._parts: list[Tensor] = []
        self.sizes: list[int] = []
        self.taken = False
        self._displacement: list[Tensor] = []
        self._from_state: StepFromState | None = None
        # What was worked out of the step, by the first parameter of the piece.
        self._worked_out: dict[int, Backwards] = {}
        # θ̂, while the parameters stand elsewhere, and where that is.
        self._stepped: list[Tensor] = []
        self._factors: list[float] = []

    def before_step(self, layers: Iterable[Iterable[Tensor]]) -> None:
        """Notes where the parameters are.

        Args:
            layers (`Iterable[Iterable[torch.Tensor]]`): The parameters of every layer.
        """
        by_layer = [[p for p in layer if p.grad is not None] for layer in layers]
        parameters = [p for layer in by_layer for p in layer]
        if [id(p) for p in parameters] != [id(p) for p in self.parameters]:
            self.parameters = parameters
            self._parts = [local(p) for p in parameters]
            self._displacement = []
        self.sizes = [len(layer) for layer in by_layer]
        self.discard()
        options = step_options(self.optimizer, parameters)
        if self.optimizer is not None and options is not None:
            self._displacement, self._from_state = [], StepFromState(self.optimizer, parameters, options)
            return
        self._from_state = None
        with torch.no_grad():
            self._displacement = self._displacement or [torch.empty_like(part) for part in self._parts]
            _copy(self._displacement, self._parts)

    def after_step(self) -> None:
        """Notes the step that the optimizer has taken."""
        with torch.no_grad():
            if self._displacement:
                torch._foreach_sub_(self._displacement, self._parts)
        self.taken = True

    def discard(self) -> None:
        """Forgets the step: its learning rates stay what they were."""
        self.taken = False
        self._worked_out = {}

    def inner_products(self, directions: Sequence[Tensor] | None = None, consume: bool = False) -> Tensor:
        """⟨gradient, Δ⟩ of every parameter, from the gradients that the parameters hold now.

        Args:
            directions (`Sequence[torch.Tensor]`, *optional*): Directions to use in place of the step taken.
            consume (`bool`, *optional*, defaults to `False`): Whether the gradients may be dropped. What was worked out
                of the step takes their room, and need not be worked out again to rescale it.

        Returns:
            `torch.Tensor` of shape `(parameters,)`, at least float32: one figure a noted parameter, on the device of
            the first. Sum them up with [`~LookAhead.sum_by_layer`]. Of a sharded parameter each process has its own
            figure; their mean over all processes is the inner product.
        """
        if not self.parameters:
            return torch.zeros(0)
        products: list[Tensor] = []
        for _, piece in self._pieces():
            gradients = [None if p.grad is None else local(p.grad) for p in self.parameters[piece]]
            if directions is not None:
                products += [dot(g, direction) for g, direction in zip(gradients, directions[piece], strict=True)]
                continue
            back = self._back(piece)
            products += [-product for product in back.products(gradients, self._parts[piece])]
            if consume and self._from_state is not None:
                clear_gradients(self.parameters[piece])
                self._worked_out[piece.start] = back
        device = self.parameters[0].device
        return torch.stack([d.to(device) * shards(p) for d, p in zip(products, self.parameters, strict=True)])

    def sum_by_layer(self, products: Tensor) -> Tensor:
        """Sums figures of parameters up to figures of layers.

        Args:
            products (`torch.Tensor` of shape `(parameters,)`): What [`~LookAhead.inner_products`] gave.

        Returns:
            `torch.Tensor` of shape `(layers,)`.
        """
        return torch.stack([part.sum() for part in products.split(self.sizes)])

    @torch.no_grad()
    def rescale(self, ratios: Sequence[float], keep: bool = False) -> None:
        """Moves every layer to where a step with another learning rate would have put it.

        Args:
            ratios (`Sequence[float]`): α'/α of every layer. A layer with ratio 1 is not touched, so its parameters
                stay the same bit for bit.
            keep (`bool`, *optional*, defaults to `False`): Whether the step, as it is now, is still held open.
        """
        for layer, piece in self._pieces():
            if ratios[layer] == 1:
                continue
            self._back(piece).add_to(self._parts[piece], 1 - ratios[layer])
            if keep and self._from_state is not None:
                self._from_state.scale(piece, ratios[layer])
            elif keep:
                torch._foreach_mul_(self._displacement[piece], ratios[layer])
        self.discard()
        self.taken = keep

    def _pieces(self) -> list[tuple[int, slice]]:
        """The parameters in pieces, with the number of their layer, so that one piece of Δ at a time is worked out."""
        # One tensor at a time stays in the cache of a CPU; an accelerator takes a layer in one call.
        at_once = 1 if all(part.device.type == "cpu" for part in self._parts) else max(self.sizes, default=1)
        pieces, first = [], 0
        for layer, size in enumerate(self.sizes):
            last = first + size
            pieces += [(layer, slice(i, min(i + at_once, last))) for i in range(first, last, at_once)]
            first = last
        return pieces

    @torch.no_grad()
    def _back(self, piece: slice) -> Backwards:
        if self._from_state is None:
            return Backwards(self._displacement[piece])
        return self._worked_out.get(piece.start) or self._from_state.back(piece)

    @contextmanager
    def excursions(self) -> Iterator[None]:
        """Keeps where the step ended, in one copy, for any number of [`~LookAhead.moved_to`] inside."""
        self._stepped, self._factors = [part.clone() for part in self._parts], [1.0] * len(self.sizes)
        try:
            yield
        finally:
            with torch.no_grad():
                _copy(self._parts, self._stepped)
            self._stepped, self._factors = [], []

    @contextmanager
    def moved_to(self, ratios: Sequence[float]) -> Iterator[None]:
        """Stands where a step with other learning rates would have ended while the context is open.

        Inside [`~LookAhead.excursions`] the parameters stay there when it closes, until the next one or the end.

        Args:
            ratios (`Sequence[float]`): α'/α of every layer. 0 is where the step began.
        """
        with nullcontext() if self._stepped else self.excursions():
            with torch.no_grad():
                for layer, piece in self._pieces():
                    if ratios[layer] != self._factors[layer]:
                        _copy(self._parts[piece], self._stepped[piece])
                        self._back(piece).add_to(self._parts[piece], 1 - ratios[layer])
            self._factors = list(ratios)
            yield

    @torch.no_grad()
    def relative_sizes(self, reduce: Callable[[Tensor], Tensor] | None = None) -> list[float]:
        """How far the step moved every layer, as a share of the norm of the layer's parameters.

        Args:
            reduce (`Callable`, *optional*): Averages a tensor over all processes.

        Returns:
            `list[float]`: ‖Δ_j‖ / ‖θ_j‖ of every layer, infinite where θ_j is zero.
        """
        squares = torch.zeros(2, len(self.sizes), device=self.parameters[0].device)
        with self.moved_to([0.0] * len(self.sizes)):
            for layer, piece in self._pieces():
                for start, end in zip(self._parts[piece], self._stepped[piece], strict=True):
                    squares[0, layer] += (end - start).float().square().sum().to(squares.device)
                    squares[1, layer] += start.float().square().sum().to(squares.device)
        moved, whole_layers = squares if reduce is None else reduce(squares)
        return (moved / whole_layers).sqrt().tolist()

    def loss_at(
        self,
        ratios: Sequence[float],
        meta_loss: Callable[[], Tensor],
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> float:
        """The validation loss where a step with other learning rates would have ended, by a forward pass alone.

        Args:
            ratios (`Sequence[float]`): α'/α of every layer.
            meta_loss (`Callable`): Takes nothing and returns the scalar validation loss.
            reduce (`Callable`, *optional*): Averages a tensor over all processes.
        """
        # Every call sees the same dropout masks.
        with torch.no_grad(), self.moved_to(ratios), preserve_random_state(self.parameters[0].device):
            loss = meta_loss().detach().reshape(1)
        return float(loss if reduce is None else reduce(loss))

    def validate(
        self,
        meta_loss: Callable[[], Tensor],
        parameters: Iterable[Tensor],
        raw_step: Sequence[float] | None = None,
        scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """The validation loss at the look-ahead and the inner products with its gradient.

        Args:
            meta_loss (`Callable`): Takes nothing and returns the scalar validation loss.
            parameters (`Iterable[torch.Tensor]`): All parameters; their gradients are lost.
            raw_step (`Sequence[float]`, *optional*): Learning rates of a step along the raw gradient g to look at in
                place of the step taken; the products are then with g.
            scale (`float` or `torch.Tensor` of shape `()`, *optional*, defaults to 1.0): Factor of the loss in the
                backward, which the products are divided by again.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the loss, of shape `()`, and the products, of shape `(parameters,)`.
        """
        if raw_step is None:
            return validation_gradient(meta_loss, parameters, scale), self.inner_products(consume=True) / scale
        with self.raw_gradient_step(raw_step) as gradients:
            return validation_gradient(meta_loss, parameters, scale), self.inner_products(gradients) / scale

    @contextmanager
    def raw_gradient_step(self, learning_rates: Sequence[float]) -> Iterator[list[Tensor]]:
        """Stands at θ - α g instead of θ̂ while the context is open: the paper's look-ahead with the raw gradient.

        Args:
            learning_rates (`Sequence[float]`): α of every layer (times the schedule's shape).

        Yields:
            `list[torch.Tensor]`: the training gradients g, taken away from the parameters.

        Raises:
            ValueError: if the training gradients are gone.
        """
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        if len(gradients) != len(self.parameters):
            raise ValueError(
                'lookahead="sgd" needs the training gradients: call scheduler.step() before optimizer.zero_grad().'
            )
        rates = [rate for rate, size in zip(learning_rates, self.sizes, strict=True) for _ in range(size)]
        with self.moved_to([0.0] * len(self.sizes)):
            with torch.no_grad():
                for part, g, rate in zip(self._parts, gradients, rates, strict=True):
                    part.sub_(g, alpha=rate)
            clear_gradients(self.parameters)
            yield gradients

    def state_dict(self, layers: Iterable[Iterable[Tensor]]) -> dict[str, Any]:
        """What a step still held open needs to be settled after a restart.

        Args:
            layers (`Iterable[Iterable[torch.Tensor]]`): The parameters of every layer.

        Returns:
            `dict`: empty if no step is held open, else the displacement of every parameter, or the options of its step
            if the optimizer's state tells the rest, `None` for unmoved ones. Displacements of sharded parameters are
            gathered, so that all processes have to call it.
        """
        if not self.taken:
            return {}
        if self._from_state is not None:
            options = dict(zip(map(id, self.parameters), self._from_state.options, strict=True))
            return {"options": [[options.get(id(p)) for p in layer] for layer in layers]}
        noted = {id(p): whole(d, p) for p, d in zip(self.parameters, self._displacement, strict=True)}
        return {"displacement": [[noted.get(id(p)) for p in layer] for layer in layers]}

    def load_state_dict(self, state_dict: dict[str, Any], layers: Iterable[Iterable[Tensor]]) -> None:
        """Restores what [`~LookAhead.state_dict`] gave.

        Args:
            state_dict (`dict`): The state.
            layers (`Iterable[Iterable[torch.Tensor]]`): The parameters of every layer, as in the saved run.
        """
        self.discard()
        self.taken = bool(state_dict)
        if not self.taken:
            return
        kind = "options" if "options" in state_dict else "displacement"
        noted = [
            [(p, own) for p, own in zip(parameters, of_layer, strict=True) if own is not None]
            for parameters, of_layer in zip(layers, state_dict[kind], strict=True)
        ]
        self.sizes = [len(layer) for layer in noted]
        self.parameters = [p for layer in noted for p, _ in layer]
        self._parts = [local(p) for p in self.parameters]
        if kind == "options" and self.optimizer is not None:
            options = [own for layer in noted for _, own in layer]
            self._displacement, self._from_state = [], StepFromState(self.optimizer, self.parameters, options)
        else:
            self._displacement = [shard_of(d.to(p.device, p.dtype), p) for layer in noted for p, d in layer]
            self._from_state = None


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
