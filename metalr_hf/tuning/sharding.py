"""Parameters that are sharded over processes (FSDP2), and this process's part of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, spread over processes.

    Args:
        tensor (`torch.Tensor`): A parameter or a gradient.

    Returns:
        `bool`
    """
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which shares its memory; of a tensor that is not sharded, all of it.

    Args:
        tensor (`torch.Tensor`): A parameter or a gradient.

    Returns:
        `torch.Tensor`: detached.
    """
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shards(parameter: Tensor) -> int:
    """Over how many processes a parameter is divided; 1 where each holds a whole copy.

    Args:
        parameter (`torch.Tensor`): A parameter.

    Returns:
        `int`
    """
    if not is_sharded(parameter):
        return 1
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return math.prod(mesh.size(i) for i, placement in enumerate(placements) if placement.is_shard())


def whole(part: Tensor, parameter: Tensor) -> Tensor:
    """Gathers the parts of all processes, which all have to call it.

    Args:
        part (`torch.Tensor`): This process's part, laid out as that of `parameter`.
        parameter (`torch.Tensor`): The parameter.

    Returns:
        `torch.Tensor` of the shape of `parameter`; `part` itself if it is not sharded.
    """
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    tensor = DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())
    return tensor.full_tensor()


def saved(part: Tensor, parameter: Tensor) -> Tensor:
    """As [`whole`], for a checkpoint: what is sharded leaves the device, on which not all of it may have room.

    Args:
        part (`torch.Tensor`): This process's part, laid out as that of `parameter`.
        parameter (`torch.Tensor`): The parameter.

    Returns:
        `torch.Tensor` of the shape of `parameter`, on the CPU; `part` itself if it is not sharded.
    """
    return whole(part, parameter).cpu() if is_sharded(parameter) else part


def shard_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor; the inverse of [`whole`].

    Args:
        tensor (`torch.Tensor`): The whole tensor, the same in every process.
        parameter (`torch.Tensor`): The parameter whose layout it gets.

    Returns:
        `torch.Tensor` of the shape of this process's part; `tensor` itself if `parameter` is not sharded.
    """
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()


def reshard(model: torch.nn.Module) -> None:
    """Drops the whole copies of sharded parameters that a forward without a backward leaves behind.

    The next forward would take them as they are, and not see that their parts have been changed.

    Args:
        model (`torch.nn.Module`): A model, sharded with `fully_shard` or not.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def refuse_fsdp1(version: int) -> None:
    """Raises `ValueError` if the version of FSDP is 1.

    Args:
        version (`int`): As accelerate's FSDP plugin has it.
    """
    if version == 1:
        raise ValueError(
            "FSDP 1 flattens the parameters of a layer into one, and is deprecated. Use FSDP 2: "
            'fsdp_config={"version": 2}, or `fsdp_version: 2` in the file of `accelerate config`.'
        )
