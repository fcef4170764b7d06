"""A loop of one's own on Fabric: two processes share out each step's tasks, and end with one process's parameters."""

import json
import os
import subprocess
import sys

import torch

from lightning_ntk.settings.config import conf_folder

LOOP = """
import json, os, sys, torch
from lightning_fabric import Fabric
from datamodules.sinusoid import Sinusoid
from lightning_ntk.methods.meta_rkhs_ii import MetaRKHSII
from lightning_ntk.networks.mlp import MLP

fabric = Fabric(accelerator="cpu", devices=int(sys.argv[1]), strategy="ddp", precision="64-true")
fabric.launch()
torch.manual_seed(0)
data = Sinusoid(tasks_per_step=4, steps_per_epoch=3)
data.prepare_data()
data.setup()
torch.set_default_dtype(torch.float64)
method = MetaRKHSII(MLP(data.spec.input_shape, data.spec.outputs), data.spec)
module, optimizer = fabric.setup(method, method.configure_optimizers())
module.mark_forward_method("meta_loss")
seen = []
for batch in fabric.setup_dataloaders(data.train_dataloader()):
    fabric.backward(module.meta_loss(data.on_after_batch_transfer(batch, 0)))
    optimizer.step()
    optimizer.zero_grad()
    seen.append(batch.index.tolist())
total = sum(p.detach().abs().sum().item() for p in method.parameters())
with open(f"{sys.argv[1]}_{fabric.global_rank}.json", "w") as file:
    json.dump([seen, total], file)
fabric.barrier()  # Both have written.
os._exit(0)  # At once: gloo's threads can abort a process that is about to end.
"""


def run_loop(folder, processes):
    (folder / "loop.py").write_text(LOOP)
    command = [sys.executable, "-W", "ignore", "loop.py", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(conf_folder().parent), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=280)
    return [json.loads((folder / f"{processes}_{rank}.json").read_text()) for rank in range(processes)]


def test_ranks_of_fabric_share_out_a_steps_tasks(tmp_path):
    ((alone, expected),) = run_loop(tmp_path, 1)
    (first, total), (second, other) = run_loop(tmp_path, 2)
    assert alone == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == alone
    torch.testing.assert_close(torch.tensor([total, other]), torch.tensor([expected, expected]), rtol=1e-6, atol=0)
