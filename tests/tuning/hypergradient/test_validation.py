import torch

from metalr_hf.tuning.hypergradient.validation import gather, validation_gradient


class OnAppleGPU(torch.Tensor):
    """Has no float64, and is an ordinary tensor once it is on the CPU."""

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_figures_become_float64_on_the_cpu_only():
    products = torch.tensor([1.0, 2.0, 4.0]).as_subclass(OnAppleGPU)
    loss, by_layer, overflowed = gather(
        products, torch.tensor(0.5), [], lambda values: torch.stack([values[0], values[1] + values[2]])
    )
    assert (loss, by_layer.tolist(), overflowed) == (0.5, [1.0, 6.0], False)
    assert by_layer.dtype == torch.float64


def test_the_scale_is_in_the_gradients_and_not_in_the_loss():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    for scale in (1024.0, torch.tensor(1024.0)):
        loss = validation_gradient(lambda: (weight**2).sum(), [weight], scale)
        assert (float(loss), float(weight.grad)) == (4.0, 4096.0)
