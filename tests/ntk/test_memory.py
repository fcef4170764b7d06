"""Footprints of a known network, and what is planned from them."""

import torch
from torch import nn

from lightning_ntk.energy import tasks as tasks_module
from lightning_ntk.energy.tasks import Planner
from lightning_ntk.networks.mlp import MLP
from lightning_ntk.ntk import memory
from lightning_ntk.ntk.convolution import _channels_last
from lightning_ntk.ntk.network import functional

CPU = torch.device("cpu")


def test_a_footprint_is_of_one_example_whatever_the_batch():
    network, params = functional(MLP((3,), 2, hidden=(100,)))
    found = memory.footprint(network, params, torch.randn(1000, 3))
    assert found.largest == 100 * 4
    # The hidden layer before and after its ReLU, and the output; not the weights, nor the input.
    assert found.total == (100 + 100 + 2) * 4
    assert found == memory.footprint(network, params, torch.randn(1, 3))


def test_weights_in_another_form_are_no_examples():
    # A transposed view of a frozen weight, and the engine's channels-last copy of a large convolution's.
    frozen = nn.Sequential(nn.Linear(1000, 1000).requires_grad_(False), nn.Linear(1000, 2))
    found = memory.footprint(*functional(frozen), torch.randn(1, 1000))
    assert found == memory.Footprint(largest=1000 * 4, total=(1000 + 2) * 4)
    convolution = nn.Conv2d(64, 64, 3)
    found = memory.footprint(*functional(convolution), torch.randn(1, 64, 18, 18))
    assert 64 * 16 * 16 * 4 <= found.largest < convolution.weight.numel() * 4


def test_a_tensor_that_is_filled_with_examples_counts():
    def network(params, x):
        room = torch.zeros(len(x), 50)
        room[:, :3] = x
        return room @ params["weight"]

    found = memory.footprint(network, {"weight": torch.randn(50, 2)}, torch.randn(4, 3))
    assert found.total >= (3 + 2) * 4


def test_inside_a_vmap_the_examples_are_those_of_all_its_parts():
    network, params = functional(MLP((3,), 2, hidden=(100,)))
    found = []
    torch.func.vmap(lambda x: found.append(memory.footprint(network, params, x)) or x.sum())(torch.randn(5, 4, 3))
    assert found[0].largest == 5 * 100 * 4


def test_a_cpu_works_on_what_stays_below_its_limit_and_a_gpu_on_what_fits(monkeypatch):
    footprint = memory.Footprint(largest=1000, total=5000)
    assert footprint.pairs_at_once(CPU) == memory.CPU_TENSOR_BYTES // 1000
    assert memory.Footprint(largest=2**40, total=2**41).pairs_at_once(CPU) == 1
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**6)
    assert footprint.pairs_at_once(torch.device("cuda")) == 10**6 // 2 // (memory.NESTED * 5000)


def test_free_memory_is_what_the_system_says_or_half_of_all(monkeypatch):
    assert 2**20 < memory.available_bytes(CPU) < 2**50
    text = "MemTotal:       16000 kB\nMemFree:          100 kB\nMemAvailable:    7000 kB\n"
    monkeypatch.setattr(memory.Path, "read_text", lambda path: text if str(path) == "/proc/meminfo" else "")
    assert memory.available_bytes(CPU) == 7000 * 1024
    monkeypatch.setattr(memory, "left_by_control_groups", lambda root: [9000 * 1024, 3000 * 1024])
    assert memory.available_bytes(CPU) == 3000 * 1024
    monkeypatch.setattr(memory, "left_by_control_groups", lambda root: [])

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(memory.Path, "read_text", missing)
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert memory.available_bytes(CPU) == 4096 * 500


def test_control_groups_of_both_versions_leave_what_their_limits_say(tmp_path):
    def write(name, text):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    assert memory.left_by_control_groups(tmp_path) == []
    write("proc/self/cgroup", "0::/job/step\n")
    write("sys/fs/cgroup/job/step/memory.max", "max\n")
    write("sys/fs/cgroup/job/step/memory.current", "800\n")
    assert memory.left_by_control_groups(tmp_path) == []
    # The job's limit holds for its step; pages of files can be taken back.
    write("sys/fs/cgroup/job/memory.max", "1000\n")
    write("sys/fs/cgroup/job/memory.current", "900\n")
    assert memory.left_by_control_groups(tmp_path) == [100]
    write("sys/fs/cgroup/job/memory.stat", "anon 750\nactive_file 100\ninactive_file 50\n")
    assert memory.left_by_control_groups(tmp_path) == [250]
    write("sys/fs/cgroup/memory.max", "1200\n")
    write("sys/fs/cgroup/memory.current", "1300\n")
    assert memory.left_by_control_groups(tmp_path) == [250, 0]
    write("proc/self/cgroup", "5:cpuset:/job\n4:cpu,memory:/container\n0::/nowhere/else\n")
    write("sys/fs/cgroup/memory/container/memory.limit_in_bytes", "5000\n")
    write("sys/fs/cgroup/memory/container/memory.usage_in_bytes", "2000\n")
    write("sys/fs/cgroup/memory/container/memory.stat", "inactive_file 1\ntotal_inactive_file 30\n")
    assert memory.left_by_control_groups(tmp_path) == [3030, 0]


def test_tasks_with_the_trace_kernel_are_planned_with_their_queries_rows(monkeypatch):
    network, params = functional(MLP((3,), 2, hidden=(100,)))
    support_x, query_x = torch.randn(6, 4, 3), torch.randn(6, 7, 3)
    of_example = 2 * 4 * sum(p.numel() for p in params.values())
    monkeypatch.setattr(tasks_module, "available_bytes", lambda device: 2 * 60 * of_example)

    def tasks(**settings):
        return Planner(coupled=False, outputs=2, **settings).chunks(network, params, support_x, query_x).tasks

    # 3 times the rows of 4 support examples; 4 times those, and 2 times those of 7 queries.
    assert (tasks(), tasks(query_rows=True)) == (60 // 12, 60 // 30)


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
