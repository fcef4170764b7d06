"""What in a meta-step would make the host wait for a GPU: numbers that are read, shapes that depend on data.

Checked on a CPU, by the operations that run. A matrix decomposition waits too, inside itself, for its error code.
"""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.methods.meta_rkhs_i import MetaRKHSI
from lightning_ntk.methods.meta_rkhs_ii import MetaRKHSII
from lightning_ntk.networks.conv4 import Conv4

SHAPE, WAYS = (1, 16, 16), 3
READING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2", "item"}
DECOMPOSITIONS = {"_linalg_eigh", "_linalg_svd"}


class Waits(TorchDispatchMode):
    """Counts the operations that wait, by name."""

    def __enter__(self):
        self.found = collections.Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
        )
        if name in READING | DECOMPOSITIONS or by_mask:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def waits_of_a_meta_loss(make, norm, kind):
    """The waits of the third meta-loss of two tasks, one at a time: what is planned once is planned by then."""
    torch.manual_seed(0)
    spec = TaskSpec(kind=kind, input_shape=SHAPE, outputs=WAYS)
    method = make(Conv4(SHAPE, WAYS, filters=16, norm=norm), spec, tasks_per_chunk=1)
    y = torch.arange(WAYS).expand(2, -1)
    y = torch.nn.functional.one_hot(y, WAYS).float() if kind == "regression" else y
    x = torch.rand(2, WAYS, *SHAPE)
    episodes = Episode(support_x=x, support_y=y, query_x=x + 0.1, query_y=y, index=torch.arange(2))
    for _ in range(2):
        method.meta_loss(episodes).backward()
    with Waits() as waits:
        method.meta_loss(episodes).backward()
    return dict(waits.found)


@pytest.mark.parametrize("norm", ["none", "group", "batch"])
def test_meta_rkhs_ii_reads_the_rank_of_each_chunk_and_nothing_else(norm):
    found = waits_of_a_meta_loss(MetaRKHSII, norm, "regression")
    assert found == {"_local_scalar_dense": 2, "_linalg_eigh": 4, "_linalg_svd": 2}


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_meta_rkhs_ii_that_leaves_nothing_out_reads_no_number(norm):
    found = waits_of_a_meta_loss(lambda *a, **k: MetaRKHSII(*a, rank_tolerance=0.0, **k), norm, "regression")
    assert found == ({"_linalg_eigh": 4, "_linalg_svd": 2} if norm == "batch" else {"_linalg_eigh": 2})


@pytest.mark.parametrize("norm", ["none", "group"])
@pytest.mark.parametrize("settings", [{}, {"step_cap": 0.4}, {"euler_steps": 1}])
def test_meta_rkhs_i_on_a_gpu_never_waits(norm, settings, monkeypatch):
    monkeypatch.setattr(MetaRKHSI, "device", torch.device("cuda"))
    assert waits_of_a_meta_loss(lambda *a, **k: MetaRKHSI(*a, **settings, **k), norm, "classification") == {}


def test_meta_rkhs_i_with_coupled_examples_chooses_a_rank_also_on_a_gpu(monkeypatch):
    monkeypatch.setattr(MetaRKHSI, "device", torch.device("cuda"))
    found = waits_of_a_meta_loss(MetaRKHSI, "batch", "classification")
    assert found == {"_local_scalar_dense": 2, "_linalg_eigh": 2, "_linalg_svd": 2}
