"""The neural tangent kernel as pure functions of tensors: no Lightning, no logging, usable without the rest."""

from lightning_ntk.ntk.flow import GradientFlow, gradient_flow
from lightning_ntk.ntk.jacobian import Jacobian
from lightning_ntk.ntk.kernel import empirical_ntk
from lightning_ntk.ntk.network import functional
from lightning_ntk.ntk.spectrum import as_matrix

__all__ = ["GradientFlow", "Jacobian", "as_matrix", "empirical_ntk", "functional", "gradient_flow"]
