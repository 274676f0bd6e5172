"""Several one-thread processes with averaged gradients: on a CPU faster than one process with several threads."""

import contextlib
import copy
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist


def launch(worker: Callable, num_processes: int, *args):
    """Run `worker(rank, *args)` in `num_processes` processes of one thread each; in this very process if there is one.

    An error in one process ends all of them and is raised here, as it was raised there. Killing this process ends the
    others, too.

    Args:
        worker (`Callable`): a function of a module (it is pickled by name).
        num_processes (`int`): 1 or more.
    Raises:
        ValueError: if `num_processes` is not positive.
    """
    if num_processes < 1:
        raise ValueError(f"`num_processes` must be at least 1, got {num_processes}.")
    if num_processes == 1:
        worker(0, *args)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
    try:
        torch.multiprocessing.spawn(_run, (worker, num_processes, port, args, errors), nprocs=num_processes)
    except torch.multiprocessing.ProcessRaisedException as error:
        if errors.empty():
            raise
        raise errors.get() from error  # the first: those of other processes are that its connection broke


def _run(rank: int, worker: Callable, num_processes: int, port: int, args: tuple, errors):
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_processes)
    try:
        worker(rank, *args)
    except Exception as error:
        with contextlib.suppress(Exception):  # not every exception can be pickled, or made again
            copy.copy(error)
            errors.put(error)
        raise
    finally:
        dist.destroy_process_group()


def _end_with_parent(parent: int):
    """After a `kill -9` of the launching process nobody else would stop this one, and it would go on writing."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast_(tensor: torch.Tensor):
    """Give every process the first one's values, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)


def average_(tensors: Iterable[torch.Tensor]):
    """Replace each tensor by its mean over the processes, in place, in one message."""
    tensors = list(tensors)
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def average_gradients_(parameters: Iterable[torch.nn.Parameter]):
    """Mean of the gradients over the processes; parameters without a gradient are skipped."""
    average_(parameter.grad for parameter in parameters if parameter.grad is not None)
