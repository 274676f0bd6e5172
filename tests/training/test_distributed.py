"""Several processes: an error of one is raised as what it is."""

import pytest
import torch
from emu35.training import distributed
from emu35.training.distributed import launch


def _refuse(rank, name):
    if rank == 1:
        raise ValueError(f"`{name}` is wrong.")
    torch.distributed.barrier()


@pytest.mark.slow
def test_an_error_of_a_process_is_raised_here():
    with pytest.raises(ValueError, match=r"^`steps` is wrong\.$"):
        launch(_refuse, 2, "steps")


class _Unpicklable(Exception):
    def __init__(self, one, other):
        super().__init__(one)


@pytest.mark.parametrize(("error", "raised"), [(OSError(2, "none"), OSError), (_Unpicklable(1, 2), None)])
def test_errors_on_their_way(monkeypatch, error, raised):
    """As above, without the seconds that processes take to start."""

    def spawn(function, args, nprocs):
        try:
            function(0, *args)
        except Exception as found:
            raise torch.multiprocessing.ProcessRaisedException("the traceback", 0, 1) from found

    def worker(rank):
        raise error

    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(distributed.dist, name, lambda *args, **options: None)
    monkeypatch.setattr(distributed.threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    with pytest.raises(raised or torch.multiprocessing.ProcessRaisedException) as found:
        launch(worker, 2)
    if raised:
        assert found.value.args == error.args
