"""A device that is not the CPU, on a machine that has no other.

Fake tensors have shapes, types and devices but no numbers. Every operation on them checks that its tensors lie on one
device, as a GPU's would, and fails where a number is read, which a GPU's would make the host wait for. The device is
"meta": the fake CUDA of a machine without one has no backward pass.
"""

import contextlib
import importlib
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_ntk.ntk import checks

DEVICE = torch.device("meta")


@contextlib.contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Fake tensors alone; `with DEVICE:` inside makes new ones lie there."""
    autocast, is_autocast_enabled = torch.autocast, torch.is_autocast_enabled
    optimizer = importlib.import_module("torch.optim.optimizer")
    fused = optimizer._get_fused_kernels_supported_devices
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        # What knows the names of devices does not know this one.
        patch.setattr(torch, "autocast", lambda device, **k: autocast("cpu" if device == "meta" else device, **k))
        patch.setattr(torch, "is_autocast_enabled", lambda d="cuda": is_autocast_enabled("cpu" if d == "meta" else d))
        patch.setattr(checks, "_generator_states", list)  # Real tensors, whose numbers are not to be read here.
        patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*fused(), "meta"])
        yield DEVICE
