"""Meta-RKHS-II: adaptation by gradient flow in the RKHS of the network's NTK, solved in closed form."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ntk.energy import meta_rkhs_ii as energy
from lightning_ntk.energy.tasks import check_tasks_per_chunk
from lightning_ntk.episode import Episode, TaskSpec
from lightning_ntk.methods.base import MetaLearner, Predictor
from lightning_ntk.ntk.flow import Approximation, check_flow_settings
from lightning_ntk.ntk.jacobian import functional


class MetaRKHSII(MetaLearner):
    """Minimises E_m[ L_query(f_t) ] with f_t the closed-form adaptation (Zhou et al. 2021, eq. 5-7).

        f_t(x) = f(x) + Theta(x, X) H^-1 (I - e^{-tH}) (Y - f(X)),      t = inf: f(x) + Theta(x, X) H^-1 (Y - f(X))

    Classification is regression on one-hot targets shifted by 1/C (Arora et al. 2019); the query loss is the mean
    squared error. Cost per task, in the paper's terms: O(n C1 + n^3). See `energy.meta_rkhs_ii` for how.

    Args:
        t: time of the flow under the loss 1/2 sum_i |f(x_i) - y_i|^2, in (0, inf]; the paper uses 0.1 to inf.
        approximation: "exact", or the paper's Pade variants "pade11" and "pade22" (t100_PQ1, t100_PQ2).
        ridge: added to the kernel's eigenvalues (ours; needed at t = inf where the kernel has no full rank).
        rank_tolerance: relative error allowed in the low-rank part of the meta-gradient (ours).
        tasks_per_chunk: tasks computed at once by vmap (ours). Pays for small networks and on GPUs; on a CPU,
            convolutions are faster one task at a time.
        lr: the paper's meta learning rate is 0.01.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: TaskSpec,
        *,
        t: float = 10.0,
        approximation: Approximation = "exact",
        ridge: float = 0.0,
        rank_tolerance: float = 1e-6,
        tasks_per_chunk: int = 4,
        lr: float = 1e-2,
    ) -> None:
        super().__init__(network, spec, lr=lr)
        t = float(t)
        check_flow_settings(t, approximation, ridge)
        check_tasks_per_chunk(tasks_per_chunk)
        coupled = getattr(network, "couples_examples", True)
        self.how = energy.ClosedForm(t, approximation, ridge, coupled, rank_tolerance)
        self.tasks_per_chunk = tasks_per_chunk

    def regression_targets(self, y: Tensor) -> Tensor:
        """Real targets `[n, C]`: shifted one-hot vectors of class numbers `[n]`, or y itself in regression."""
        if self.spec.kind == "regression":
            return y
        return F.one_hot(y, self.spec.outputs).to(self.network.head.weight.dtype) - 1 / self.spec.outputs

    def meta_loss(self, episodes: Episode) -> Tensor:
        network, params = functional(self.network)
        with self._full_precision():
            loss, gradient = energy.meta_gradient(
                network,
                params,
                episodes.support_x,
                self.regression_targets(episodes.support_y),
                episodes.query_x,
                self.regression_targets(episodes.query_y),
                F.mse_loss,
                self.how,
                tasks_per_chunk=self.tasks_per_chunk,
            )
        return energy.with_gradient(loss, params, gradient)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        network, params = functional(self.network)
        params = {name: p.detach() for name, p in params.items()}
        with self._full_precision():
            tangent = energy.adapt(network, params, support_x, self.regression_targets(support_y), self.how)
        return lambda x: energy.adapted_outputs(network, params, tangent, x)

    def _full_precision(self) -> torch.autocast:
        """Jacobians and kernels of half-precision numbers are conditioned too badly to be solved with."""
        return torch.autocast(self.device.type, enabled=False)
