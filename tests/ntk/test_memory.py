"""Footprints of a known network, and what is planned from them."""

import torch

from lightning_ntk.energy import tasks as tasks_module
from lightning_ntk.energy.tasks import Planner
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.ntk import memory
from lightning_ntk.ntk.convolution import _channels_last
from lightning_ntk.ntk.jacobian import functional

CPU = torch.device("cpu")


def test_a_footprint_is_of_one_example_whatever_the_batch():
    network, params = functional(MLP((3,), 2, hidden=(100,)))
    found = memory.footprint(network, params, torch.randn(1000, 3))
    assert found.largest == 100 * 4
    # The hidden layer before and after its ReLU, and the output; not the weights, nor the input.
    assert found.total == (100 + 100 + 2) * 4
    assert found == memory.footprint(network, params, torch.randn(1, 3))


def test_a_cpu_works_on_what_stays_below_its_limit_and_a_gpu_on_what_fits(monkeypatch):
    footprint = memory.Footprint(largest=1000, total=5000)
    assert footprint.pairs_at_once(CPU) == memory.CPU_TENSOR_BYTES // 1000
    assert memory.Footprint(largest=2**40, total=2**41).pairs_at_once(CPU) == 1
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**6)
    assert footprint.pairs_at_once(torch.device("cuda")) == 10**6 // 2 // (memory.NESTED * 5000)


def test_free_memory_is_what_the_system_says_or_half_of_all(monkeypatch):
    assert 2**20 < memory.available_bytes(CPU) < 2**50
    text = "MemTotal:       16000 kB\nMemFree:          100 kB\nMemAvailable:    7000 kB\n"
    monkeypatch.setattr(memory.Path, "read_text", lambda path: text if str(path) == "/proc/meminfo" else None)
    assert memory.available_bytes(CPU) == 7000 * 1024

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(memory.Path, "read_text", missing)
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert memory.available_bytes(CPU) == 4096 * 500


def test_tasks_at_once_follow_the_largest_work_of_a_task_and_are_never_more_than_there_are(monkeypatch):
    network, params = functional(MLP((3,), 2, hidden=(100,)))
    support_x, query_x = torch.randn(6, 4, 3), torch.randn(6, 7, 3)

    def tasks(pairs, **settings):
        monkeypatch.setattr(memory, "CPU_TENSOR_BYTES", pairs * 400)
        return Planner(**settings).chunks(network, params, support_x, query_x).tasks

    # 4 examples with 2 outputs are 8 pairs, times 4 where examples are coupled; without a Jacobian, the 7 queries.
    assert tasks(24, coupled=False, outputs=2) == 3
    assert tasks(32 * 2, coupled=True, outputs=2) == 2
    assert tasks(7 * 5, coupled=True) == 5
    assert tasks(1, coupled=False, outputs=2) == 1
    assert tasks(10_000, coupled=False, outputs=2) == 6
    assert tasks(24, coupled=False, outputs=2, tasks_per_chunk=5) == 5


def test_large_query_sets_are_taken_one_by_one_on_a_cpu(monkeypatch):
    network, params = functional(MLP((3,), 2, hidden=(100,)))
    support_x, query_x = torch.randn(6, 4, 3), torch.randn(6, 7, 3)
    for limit, apart in ((7 * 400, False), (7 * 400 - 1, True)):
        monkeypatch.setattr(tasks_module, "CPU_QUERY_BYTES", limit)
        plan = Planner(coupled=False, tasks_per_chunk=2).chunks(network, params, support_x, query_x)
        assert (plan.tasks, plan.queries_apart) == (2, apart)


def test_a_single_image_says_its_layout_by_all_strides():
    # PyTorch takes the layout from the strides alone; a wrong one costs a copy in every convolution.
    images = torch.randn(3, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    single = _channels_last(images[:, None][1])
    assert single.stride() == (200, 1, 40, 8)
    assert torch.equal(single[0], images[1])
