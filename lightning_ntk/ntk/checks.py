"""What a network must be for its Jacobian to mean anything: a function, of outputs `[n, C]`."""

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_ntk.errors import ConfigError
from lightning_ntk.ntk import norms

# What a network may not do here, by the words that PyTorch's transforms have about it.
FORBIDDEN = {
    r"^vmap: (It looks like you're|We do not support batching operators|Attempted to vmap over `mask`)": (
        "asks for the values of a tensor in its forward pass (an `if` on it, .item(), x[x > 0], F.one_hot), which "
        "PyTorch's vmap over examples and tasks cannot give. Write it with torch.where and comparisons. (One task at a "
        "time, coupled=True goes without a vmap, if slowly.)"
    ),
    r"^vmap: .*extra_args\) is not possible": (
        "writes into a tensor that PyTorch's vmap over examples and tasks has only one of, such as one of torch.zeros. "
        "Make it from what is written (h.new_zeros(...)), or use torch.stack or torch.cat."
    ),
    r"would mutate a captured Tensor": (
        "writes into a tensor of its own, such as a buffer, in its forward pass. Leave that out: a function of "
        "parameters and inputs keeps nothing."
    ),
    r"override the setup_context staticmethod|You tried to vmap over \w+, but|must implement the jvp function": (
        "calls an autograd.Function that PyTorch's transforms cannot follow. Give one of your own setup_context, jvp "
        "and generate_vmap_rule = True; leave torch.utils.checkpoint out, which is one."
    ),
    r"don't yet support saved tensor hooks": (
        "has hooks on the tensors that it saves, as torch.utils.checkpoint does, which PyTorch's transforms cannot "
        "follow. Leave them out."
    ),
    r"call Tensor\.requires_grad_\(\)|does not require grad and does not have a grad_fn": (
        "takes derivatives by torch.autograd in its forward pass, which PyTorch's transforms do not see. Take them by "
        "torch.func.grad, torch.func.vjp or torch.func.jvp."
    ),
}
# Layers whose `dropout` is a number of their own, beside those that are a dropout.
WITH_DROPOUT = (nn.MultiheadAttention, nn.RNNBase)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def check_is_function(network: nn.Module, *, compiled: bool = False) -> None:
    """Raise `ConfigError` unless a network, in the mode it is in, is a function of its parameters and inputs alone.

    Args:
        compiled: whether its derivatives are to be compiled, which takes PyTorch's own norms (see `ntk.norms`).
    """
    for name, layer in network.named_modules():
        what = None
        if layer.training and _dropout(layer) > 0:
            what = "draws random numbers. Leave it out, or set its dropout to 0"
        elif isinstance(layer, nn.RReLU):
            what = "draws random numbers, and goes through no vmap even where it does not. Use nn.LeakyReLU"
        elif layer.training and (hasattr(layer, "n_power_iterations") or _has_hook(layer, SpectralNorm)):
            what = "goes on estimating a norm at each call. Use torch.nn.utils.parametrizations.orthogonal"
        elif layer.training and getattr(layer, "running_mean", None) is not None:
            what = "keeps running averages. Use networks.normalisation.BatchStatistics, or nn.GroupNorm"
        elif isinstance(layer, EMBEDDINGS) and layer.max_norm is not None:
            what = "writes to its weight at each call. Leave max_norm out"
        elif isinstance(layer, EMBEDDINGS) and (layer.sparse or layer.scale_grad_by_freq):
            what = "has other gradients than its function's, or sparse ones. Leave out scale_grad_by_freq and sparse"
        elif layer._backward_hooks or layer._backward_pre_hooks:
            what = "has backward hooks, which PyTorch's transforms do not call. Remove them (handle.remove())"
        elif compiled and isinstance(layer, norms.MODULES):
            what = "has derivatives that come out wrong when compiled. Set method.compile=false, or use nn.GroupNorm"
        if what:
            raise ConfigError(f"network: layer {name} ({type(layer).__name__}) {what}.")


def check_is_open(network: nn.Module) -> None:
    """Raise `ConfigError` for layers that were scripted or exported: the engine cannot put its norms into the place of
    theirs, whose derivatives come out wrong (see `ntk.norms`)."""
    for name, layer in network.named_modules():
        nodes = layer.graph.nodes if isinstance(layer, torch.fx.GraphModule) else ()
        exported = any(isinstance(node.target, torch._ops.OpOverload) for node in nodes)
        if exported or isinstance(layer, torch.jit.ScriptModule):
            raise ConfigError(
                f"network: {name or 'all of it'} was scripted or exported, and the engine cannot see into it. Give the "
                "module as it was before torch.jit or torch.export."
            )


def check_second_derivatives(network: nn.Module) -> None:
    """Raise `ConfigError` for layers whose second derivatives come out wrong (seen with torch 2.14)."""
    for name, layer in network.named_modules():
        if type(layer).__name__ == "_WeightNorm" or _has_hook(layer, WeightNorm):
            raise ConfigError(
                f"network: {name} is weight_norm, whose second derivatives PyTorch gets wrong. Leave it out, or use a "
                "method without them (fomaml, meta_rkhs_ii)."
            )


def _has_hook(layer: nn.Module, kind: type) -> bool:
    """Whether one of PyTorch's older parametrisations, hooks of that kind, computes a weight of the layer."""
    return any(isinstance(hook, kind) for hook in layer._forward_pre_hooks.values())


@contextlib.contextmanager
def drawing_nothing(network: nn.Module) -> Iterator[None]:
    """Inside, a network that draws from PyTorch's generator of random numbers ends in a `ConfigError`.

    What draws is no function, and no layer that `check_is_function` knows (`F.dropout` in a forward of one's own). So
    does one that does what is `FORBIDDEN`.
    """
    name = type(network).__name__
    message = f"network: {name} draws random numbers in its forward pass. Leave that out, or call eval() where it does."
    before = _generator_states()
    try:
        yield
    except RuntimeError as error:
        check_is_allowed(network, error)
        if "random operation" not in str(error):  # vmap's words.
            raise
        raise ConfigError(message) from error
    if _generator_states() != before:
        raise ConfigError(message)


def check_is_allowed(network: nn.Module, error: Exception) -> None:
    """Raise `ConfigError` where an error says that the network did what is `FORBIDDEN`."""
    for words, what in FORBIDDEN.items():
        if re.search(words, str(error)):
            raise ConfigError(f"network: {type(network).__name__} {what}") from error


def _generator_states() -> list[bytes]:
    """What the generators of the host, and of the GPU in use where there is one, will give next."""
    with torch._C._DisableFuncTorch(), torch._C.DisableTorchFunction():
        states = [torch.default_generator.get_state()]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states.append(torch.cuda.get_rng_state())
        return [state.numpy().tobytes() for state in states]


def _dropout(layer: nn.Module) -> float:
    """The probability with which a layer in training drops numbers."""
    if isinstance(layer, WITH_DROPOUT):
        return layer.dropout
    return layer.p if isinstance(layer, _DropoutNd) else 0.0


def check_derivatives() -> None:
    """Raise `ConfigError` inside `torch.inference_mode()`."""
    if torch.is_inference_mode_enabled():
        raise ConfigError(
            "An adaptation needs derivatives, which torch.inference_mode() has none of: some versions of PyTorch give "
            "zeros. Use torch.no_grad() instead, and pl.Trainer(inference_mode=False)."
        )


def check_operands(network: object, x: object) -> None:
    """Raise `ConfigError` for a module in the place of f(theta, x), and for inputs that are not one tensor."""
    if isinstance(network, nn.Module):
        raise ConfigError(
            f"Expected a function f(parameters, inputs), but got the module {type(network).__name__}. Take network, "
            "parameters = ntk.functional(module)."
        )
    if not isinstance(x, Tensor):
        raise ConfigError(
            f"Expected inputs as one tensor [n, ...], but got a {type(x).__name__}. Of several tensors make one, which "
            "a module of your own takes apart again."
        )


def check_outputs(outputs: Tensor, x: Tensor) -> Tensor:
    """The outputs; raise `ConfigError` unless they are a row of C numbers for each of the inputs x `[n, ...]`."""
    if not isinstance(outputs, Tensor):
        raise ConfigError(
            f"Expected a network of inputs [n, ...] to outputs [n, C], a tensor, but its outputs are of type "
            f"{type(outputs).__name__}. Wrap it in a module that returns one tensor of it."
        )
    if outputs.dim() != 2 or len(outputs) != len(x):
        raise ConfigError(
            f"Expected a network of inputs [n, ...] to outputs [n, C], but it takes inputs {list(x.shape)} to outputs "
            f"{list(outputs.shape)}. Let it end in outputs.reshape(len(x), -1), a single output in a column of its own."
        )
    return outputs
