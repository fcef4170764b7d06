"""Meta-learning with neural tangent kernels on PyTorch Lightning.

The names below are imported on first use: `lightning-ntk --help` needs no torch.
"""

import importlib

from lightning_ntk.version import __version__

_HOMES = {
    "Episode": "lightning_ntk.episode",
    "TaskSpec": "lightning_ntk.episode",
    "MetaLearner": "lightning_ntk.methods.base",
    "load_data": "lightning_ntk.load",
    "load_method": "lightning_ntk.load",
}
__all__ = ["Episode", "MetaLearner", "TaskSpec", "__version__", "load_data", "load_method"]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lightning_ntk' has no attribute {name!r}")
