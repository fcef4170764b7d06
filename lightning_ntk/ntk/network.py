"""A network as a pure function of its parameters and inputs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_ntk.errors import ConfigError
from lightning_ntk.ntk.checks import check_is_function, check_is_open, check_outputs, drawing_nothing
from lightning_ntk.ntk.layers import engine_layers
from lightning_ntk.ntk.params import Params

# f(theta, x): inputs [n, *input_shape] to outputs [n, C].
Network = Callable[[Params, Tensor], Tensor]


def functional(module: nn.Module) -> tuple[Network, Params]:
    """A module as a pure function of its trainable parameters, with those parameters as they are (not detached).

    Its layers are the engine's (`ntk.layers`); `with_own_layers` gives it with PyTorch's own.

    Raises:
        ConfigError: none of its parameters is trainable, or a part of it was scripted or exported. When the function
            is called: a layer draws random numbers or keeps running averages, in the mode that the module is in then.
    """
    check_is_open(module)
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    unreal = [name for name, p in params.items() if p.is_complex()]
    if unreal:
        raise ConfigError(
            f"Expected real parameters, but {', '.join(unreal)} are complex. Keep real and imaginary parts as two real "
            "ones, and join them by torch.complex in forward."
        )
    if not params:
        raise ConfigError(
            f"Expected a module with trainable parameters, but {type(module).__name__} has none, and "
            f"{len(list(module.parameters()))} that are frozen. Call requires_grad_(True) on those to differentiate by."
        )

    def plain(theta: Params, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return call(module, theta, x)
        check_is_function(module)
        with drawing_nothing(module):
            return call(module, theta, x)

    def network(theta: Params, x: Tensor) -> Tensor:
        with engine_layers():
            return plain(theta, x)

    network.plain = plain
    return network, params


def with_own_layers(network: Network) -> Network:
    """A network of `functional` or `composed` without the engine's layers; any other function as it is."""
    return getattr(network, "plain", network)


def call(module: nn.Module, theta: Params, x: Tensor) -> Tensor:
    """A module's outputs at other parameters than its own, which `theta` has by their names in `named_parameters`.

    Each parameter is put in place once, wherever the module shares it: `functional_call`'s own way of doing so leaves a
    plain tensor behind where one part of a module stands in two places (seen with torch 2.14).
    """
    first: dict[Tensor, str] = {}
    placed = {}
    for prefix, part in module.named_modules():  # Each part once.
        for key, parameter in part._parameters.items():
            if parameter is not None:
                place = f"{prefix}.{key}" if prefix else key
                name = first.setdefault(parameter, place)
                if name in theta:
                    placed[place] = theta[name]
    return functional_call(module, placed, (x,), tie_weights=False)


def composed(network: Network, function: Callable[[Tensor], Tensor]) -> Network:
    """A network followed by a function of its outputs without parameters, `[n, C]` to `[n, C']`."""

    def followed(inner: Network) -> Network:
        return lambda theta, x: function(check_outputs(inner(theta, x), x))

    whole = followed(network)
    whole.plain = followed(with_own_layers(network))
    return whole
