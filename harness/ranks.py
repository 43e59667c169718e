"""What all ranks know of each other."""

from collections.abc import Callable

import torch
import torch.distributed as dist


def everybodys(share) -> list:
    """What all ranks have, in their order. Collective, once there is a process group."""
    if not dist.is_initialized():
        return [share]
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, share)
    return shares


def on_all_ranks(read: Callable, kind: type[Exception]):
    """read(), or on every rank the fault of that kind that the first such rank has. Collective."""
    result, fault = None, None
    try:
        result = read()
    except kind as error:
        fault = str(error)
    for fault_of_rank in everybodys(fault):
        if fault_of_rank is not None:
            raise kind(fault_of_rank)
    return result


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Add up the gradients of all ranks in one all-reduce. A rank may have none: zeros."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if not dist.is_initialized():
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)
