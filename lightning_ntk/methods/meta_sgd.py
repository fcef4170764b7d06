"""Meta-SGD, through learn2learn: MAML that learns a step size for every parameter."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_ntk.episode import TaskSpec
from lightning_ntk.errors import ConfigError
from lightning_ntk.methods.inner_loop import learn2learn_algorithm
from lightning_ntk.methods.maml import MAML
from lightning_ntk.ntk.checks import check_derivatives, check_outputs


class MetaSGD(MAML):
    """Minimises the query loss after k gradient steps over both the start and a step size a number (Li et al. 2017).

        E_m[ L_query(theta_k) ],   theta_{i+1} = theta_i - a * grad L_support(theta_i),   a of theta's shapes

    Cross-entropy in classification, squared loss in regression. Cost of a task in a meta-step: MAML's, O(n (k + 1) C1)
    first order in the terms of Zhou et al. (2021), Table 1, and twice the parameters.

    Args:
        inner_lr: where all step sizes start. They are learned, so that it has no effect at test. (The paper draws one
            value for all of them from [0.005, 0.1].)
        adapt_steps: k; the paper takes 1.
        test_adapt_steps: steps in validation and test; the paper takes 1.
        first_order: takes the gradients in the step as constants (ours; the step sizes still learn).
        multi_step_loss: as in MAML (ours).
        lr: meta learning rate of Adam, of the parameters and of the step sizes.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: TaskSpec,
        *,
        inner_lr: float = 0.1,
        adapt_steps: int = 1,
        test_adapt_steps: int = 1,
        first_order: bool = False,
        multi_step_loss: int = 0,
        lr: float = 1e-3,
    ) -> None:
        super().__init__(
            network,
            spec,
            inner_lr=inner_lr,
            adapt_steps=adapt_steps,
            test_adapt_steps=test_adapt_steps,
            first_order=first_order,
            multi_step_loss=multi_step_loss,
            lr=lr,
        )
        frozen = next((name for name, p in network.named_parameters() if not p.requires_grad), None)
        if frozen is not None:
            raise ConfigError(
                f"method=meta_sgd learns a step size for every parameter, but the network's {frozen} is frozen. Use "
                "method=maml, which leaves it as it is, or train it too."
            )
        if len(list(network.named_parameters(remove_duplicate=False))) > len(list(network.parameters())):
            raise ConfigError(
                "method=meta_sgd: learn2learn's step does not follow a parameter that stands in several places of the "
                "network. Use method=maml, which does, or give each place its own."
            )
        self.step_sizes = nn.ParameterList(torch.full_like(p, inner_lr) for p in network.parameters())
        self._algorithm = learn2learn_algorithm("MetaSGD")

    def inner_steps(
        self, module: nn.Module, x: Tensor, y: Tensor, steps: int, first_order: bool
    ) -> Iterator[nn.Module]:
        check_derivatives()
        learner = self._algorithm(module, lrs=self.step_sizes, first_order=first_order).clone()
        yield learner
        for _ in range(steps):
            loss = self.loss(check_outputs(learner(x), x), y)
            try:
                learner.adapt(loss)
            except RuntimeError as error:
                if "not have been used in the graph" not in str(error):
                    raise
                raise ConfigError(
                    "method=meta_sgd: learn2learn's step takes a gradient by every parameter, but the outputs do not "
                    "depend on some of the network's. Use method=maml, which leaves them as they are, or remove them."
                ) from error
            yield learner
