"""Meta-learning with neural tangent kernels on PyTorch Lightning.

`import lightning_ntk` loads torch only; Lightning comes with the first use of `MetaLearner`.
"""

from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.version import __version__

__all__ = ["Episode", "MetaLearner", "TaskSpec", "__version__"]


def __getattr__(name: str):
    if name == "MetaLearner":
        from lightning_ntk.methods.base import MetaLearner

        return MetaLearner
    raise AttributeError(f"module 'lightning_ntk' has no attribute {name!r}")
