"""The paper's algorithm in its literal form, for the benchmark: autograd differentiates through the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Trainer

from ..layers.groups import layer_groups, split_optimizer
from ..trainer.batches import MetaStream


class SecondOrderTrainer(Trainer):
    """A `Trainer` whose every step tunes one learning rate per layer as in Chen et al. 2023, Algorithm 1.

    θ̂_j = θ_j - α_j g_j is written down with the graph of g_j = ∇_{θ_j} L_train(θ) in it, the network is called with θ̂
    in place of its parameters, and autograd takes ∂L_val(θ̂)/∂α_j through all of it. The step for real is the
    optimizer's, with the gradient g_j that is there already, and a rate changes by a factor of two at most. It is what
    [`MetaLRTrainer`] is measured against; train with that.

    Args:
        *args, **kwargs: As for `Trainer`.
        meta_dataset (`Any`): Where the validation batches come from.
        hyper_lr (`float`, *optional*, defaults to 0.1): Step size η of the learning rates: α_j ← α_j (1 - η h_j).
    """

    def __init__(self, *args: Any, meta_dataset: Any, hyper_lr: float = 0.1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.hyper_lr = hyper_lr
        self.hypergradients = torch.zeros(0)
        network: Any = self.model
        layers = layer_groups(network)
        self._layer_of = {name: i for i, members in enumerate(layers.values()) for name in members}
        self._layers = {layer: [network.get_parameter(name) for name in members] for layer, members in layers.items()}
        self.learning_rates = torch.full((len(layers),), self.args.learning_rate, device=self.args.device)
        self._meta_stream = MetaStream(meta_dataset, self.args.train_batch_size, self.data_collator)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, its param groups split by layer."""
        optimizer = super().create_optimizer(model)
        split_optimizer(optimizer, self._layers)
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Looks ahead, tunes the learning rates, and leaves the training gradient for the optimizer."""
        network: Any = self.model
        optimizer: Any = self.optimizer
        network.train()
        names = list(self._layer_of)
        theta = [network.get_parameter(name) for name in names]
        alpha = self.learning_rates.detach().requires_grad_()
        loss: Any = self.compute_loss(network, self._prepare_inputs(inputs))
        g = torch.autograd.grad(loss, theta, create_graph=True, materialize_grads=True)
        stepped = {n: p - alpha[self._layer_of[n]] * gradient for n, p, gradient in zip(names, theta, g, strict=True)}
        meta_loss = functional_call(network, stepped, (), dict(self._prepare_inputs(next(self._meta_stream)))).loss
        (self.hypergradients,) = torch.autograd.grad(meta_loss, alpha)
        self.learning_rates = alpha.detach() * (1 - self.hyper_lr * self.hypergradients).clamp(0.5, 2.0)
        rates = dict(zip(self._layers, self.learning_rates.tolist(), strict=True))
        for group in optimizer.param_groups:
            group["lr"] = rates[group["layer"]]
        for p, gradient in zip(theta, g, strict=True):
            p.grad = gradient.detach()
        return loss.detach()
