"""Memory is used again once nobody holds it, and never before."""

import gc
import pickle
import resource
import threading

import numpy as np
import pytest
import torch

from datamodules.episodes.blocks import KEPT, Blocks
from datamodules.from_arrays import FromArrays


def test_a_block_is_used_again_when_its_last_tensor_is_gone():
    blocks = Blocks()
    first = blocks.take(1000)
    place = first.data_ptr()
    assert (first.dtype, first.shape) == (torch.uint8, (1000,))
    view = first[10:20].view(2, 5)
    del first
    other = blocks.take(500)
    assert other.data_ptr() != place, "a view still holds it"
    del view
    again = blocks.take(800)
    assert (again.data_ptr(), len(again)) == (place, 800), "smaller requests fit as well"


@pytest.mark.parametrize("hold", [lambda x: x.numpy(), lambda x: torch.nn.Parameter(x.view(-1), False), lambda x: [x]])
def test_whatever_holds_a_tensor_holds_its_bytes(hold):
    blocks = Blocks()
    held = hold(blocks.take(64).fill_(7))
    gc.collect()
    others = [blocks.take(64).fill_(number) for number in range(5)]
    assert np.asarray(held[0] if isinstance(held, list) else held.data).tolist() == [7] * 64
    assert [int(other[0]) for other in others] == [0, 1, 2, 3, 4]


def test_larger_requests_get_larger_blocks_and_few_are_kept():
    blocks = Blocks()
    blocks.take(10)
    assert len(blocks.take(1000)) == 1000
    held = [blocks.take(10) for _ in range(KEPT + 4)]
    held.clear()
    assert len(blocks._free) == KEPT


def test_another_process_has_blocks_of_its_own():
    blocks = Blocks()
    blocks.take(10)
    assert pickle.loads(pickle.dumps(blocks))._free == []


def test_threads_never_get_the_same_block():
    blocks, wrong = Blocks(), []

    def work(number):
        for _ in range(300):
            mine = blocks.take(4096).fill_(number)
            wrong.extend([number] if not bool((mine == number).all()) else [])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_loaders_batches_take_no_new_pages():
    """Forty megabytes a batch: more than the C library ever keeps by itself."""
    rng = np.random.default_rng(0)
    splits = {
        split: {f"{split}{k}": rng.integers(0, 256, (20, 3, 84, 84), dtype=np.uint8) for k in range(5)}
        for split in ("train", "test")
    }
    data = FromArrays(splits=splits, shots=5, tasks_per_step=20, steps_per_epoch=2)
    data.setup()
    loader = data.train_dataloader()
    for _ in loader:  # Two batches are alive at a time: the one in use and the next.
        pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytes_read = sum(batch.support_x.nbytes + batch.query_x.nbytes for batch in loader)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    pages = bytes_read / resource.getpagesize()
    assert pages > 20000
    assert faults < 0.05 * pages
