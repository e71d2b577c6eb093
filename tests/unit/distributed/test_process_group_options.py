"""Which libraries carry what between ranks, on which device, and what they say when a rank is lost."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qa_dist.distributed.failures import is_lost_peer
from qa_dist.distributed.ranks import Ranks
from qa_dist.distributed.rendezvous import backend_for, choose_device


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [
        ("[pair.cc:547] Connection closed by peer [10.0.0.2]:4711", True),
        (
            "NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error, NCCL version "
            "2.28.9\nncclRemoteError: A call failed possibly due to a network error or a remote process exiting",
            True,
        ),
        ("NCCL communicator was aborted on rank 3.", True),
        ("NCCL error: unhandled cuda error, NCCL version 2.28.9\nCuda failure 2 'out of memory'", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_signs_of_a_lost_peer(text: str, is_lost: bool) -> None:
    assert is_lost_peer(RuntimeError(text)) == is_lost
    assert not is_lost_peer(ValueError(text))


def test_each_process_has_a_gpu_of_its_own_before_there_is_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    # Eight GPUs; and one of its own for each process, as with --gpus-per-task=1.
    for count, local_rank, wanted in ((8, "3", 3), (1, "3", 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert choose_device() == torch.device("cuda", wanted) == chosen[-1]


@pytest.fixture
def two_kinds() -> Iterator[None]:
    """A group of this process alone that says it carries tensors of CPUs and of GPUs."""
    assert backend_for(torch.device("cuda", 0)) == "cpu:gloo,cuda:nccl"
    assert backend_for(torch.device("cpu")) == "gloo"
    # Without GPUs gloo stands in for NCCL.
    dist.init_process_group("cpu:gloo,cuda:gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


def test_objects_go_through_the_memory_of_the_host(two_kinds: None) -> None:
    from torch.distributed.distributed_c10d import _get_object_coll_device

    assert _get_object_coll_device() == "cpu"
    box = [{"weights": torch.ones(3)}]
    dist.broadcast_object_list(box, src=0)
    assert box[0]["weights"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(("device", "wanted"), [("cuda:2", [2]), ("cpu", None)])
def test_ranks_wait_on_their_own_device(device: str, wanted: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(dist, "barrier", lambda device_ids: given.append(device_ids))
    ranks = Ranks()
    ranks.device = torch.device(device)
    ranks.barrier()
    assert given == [], "one process waits for nobody"
    ranks.world_size = 2
    ranks.barrier()
    assert given == [wanted]
