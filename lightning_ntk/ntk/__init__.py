"""The neural tangent kernel as pure functions of tensors: no Lightning, no logging, usable without the rest."""

from lightning_ntk.ntk.flow import GradientFlow, gradient_flow
from lightning_ntk.ntk.jacobian import Jacobian, functional
from lightning_ntk.ntk.kernel import empirical_ntk

__all__ = ["GradientFlow", "Jacobian", "empirical_ntk", "functional", "gradient_flow"]
