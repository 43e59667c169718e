"""What all ranks know of each other."""

import torch
import torch.distributed as dist


def everybodys(share) -> list:
    """What all ranks have, in their order. Collective, once there is a process group."""
    if not dist.is_initialized():
        return [share]
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, share)
    return shares


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
