"""The network as an operator on its parameters: J (dense), J v and J^T u.

`J(x) = d f(theta, x) / d theta`, shape `[n, C, P]` for n inputs, C outputs and P parameters.
"""

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.func import grad_and_value, jvp, vjp, vmap
from torch.utils._pytree import tree_map

from lightning_ntk.errors import ConfigError
from lightning_ntk.ntk.checks import check_derivatives, check_operands, check_outputs
from lightning_ntk.ntk.layer_rows import layer_rows
from lightning_ntk.ntk.network import Network, with_own_layers
from lightning_ntk.ntk.params import Params, flatten, groups_at_once, in_chunks
from lightning_ntk.ntk.precision import full_precision

# Where so few cotangents of coupled examples or fewer are worked on at once, a CPU takes them one by one.
FEW_COTANGENTS = 48


def gradient_and_value(function: Callable[..., Tensor], *primals: Params, batched: bool) -> tuple[list[Params], Tensor]:
    """The gradients of a scalar function in each of its arguments, and its value; all detached.

    Args:
        batched: whether this runs inside a vmap. Outside, ordinary reverse mode is used: it frees what it has passed,
            where `torch.func` holds on to it.
    """
    if batched:
        gradients, value = grad_and_value(function, argnums=tuple(range(len(primals))))(*primals)
        return list(gradients), value
    with torch.enable_grad():
        leaves = [{name: p.detach().requires_grad_() for name, p in primal.items()} for primal in primals]
        value = function(*leaves)
        flat = [p for leaf in leaves for p in leaf.values()]
        found = iter(torch.autograd.grad(value, flat, allow_unused=True, materialize_grads=True))
    return [{name: next(found) for name in leaf} for leaf in leaves], value.detach()


def adapted_outputs(network: Network, params: Params, tangent: Params, x: Tensor) -> Tensor:
    """f(x) + J(x) w, `[m, C]`: the network linearised at theta and moved by w.

    One forward pass with a tangent. Differentiable in x.
    """
    outputs, change = outputs_and_change(network, params, tangent, x)
    return outputs + change


def outputs_and_change(network: Network, params: Params, tangent: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and J(x) v. Also without gradients a network's own `torch.no_grad()` is told from the caller's."""

    def both(params: Params, tangent: Params, x: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(lambda theta: network(theta, x), (params,), (tangent,))

    if torch.is_grad_enabled():
        return both(params, tangent, x)
    constants = tree_map(Tensor.detach, (params, tangent, x))
    with torch.enable_grad():
        outputs, change = both(*constants)
    return outputs.detach(), change.detach()


def _in_full_precision(method: Callable) -> Callable:
    """A method of `Jacobian`, without the caller's autocast and TF32.

    What a backward pass cannot do is told here: it is outside the network's forward, where `checks.FORBIDDEN` is.
    """

    @functools.wraps(method)
    def computed(self: "Jacobian", *args, **settings):
        try:
            with full_precision(self.x.device.type):
                return method(self, *args, **settings)
        except RuntimeError as error:
            if "use_reentrant=True" not in str(error):
                raise
            raise ConfigError(
                "The network has a part in torch.utils.checkpoint, whose derivatives by parameters PyTorch does not "
                "give here. Leave checkpointing out."
            ) from error

    return computed


class Jacobian:
    """J(x) of a network at theta on one batch of inputs, in full precision whatever autocast and TF32 are set to.

    Args:
        network: f(theta, x).
        params: theta. Derivatives of the Jacobian itself are not tracked: everything is computed on detached values.
        x: inputs `[n, *input_shape]`.
        coupled: True when outputs depend on the whole batch (batch statistics). J is then that of the whole batch and
            costs n C backward passes over n examples; otherwise it costs C of them.

    Raises:
        ConfigError: inside `torch.inference_mode`; a module as the network; inputs that are no tensor; no parameters;
            or, when they are first needed, outputs of another shape.
    """

    def __init__(self, network: Network, params: Params, x: Tensor, *, coupled: bool = True) -> None:
        check_derivatives()
        check_operands(network, x)
        if not params:
            raise ConfigError("Expected the parameters to differentiate by, {name: tensor}, but there are none.")
        self.network = network
        self.params = {name: p.detach() for name, p in params.items()}
        self.x = x
        self.coupled = coupled
        # Until it turns out that they cannot.
        self._layers_serve = True

    @functools.cached_property
    @_in_full_precision
    def outputs(self) -> Tensor:
        """f(x), `[n, C]`; with a graph to x where x asks for one."""
        with torch.set_grad_enabled(self.x.requires_grad and torch.is_grad_enabled()):
            outputs = self.network(self.params, self.x)
        check_outputs(outputs, self.x)
        return outputs

    @functools.cached_property
    def output_count(self) -> int:
        """C, from one example."""
        one = self.x[:1].clone()  # The network may write over it.
        with torch.no_grad():
            outputs = self.network(self.params, one)
        check_outputs(outputs, one)
        return outputs.shape[1]

    @functools.cached_property
    def _pullback(self) -> Callable[[Tensor], tuple[Params]]:
        return vjp(lambda theta: self.network(theta, self.x), self.params)[1]

    @_in_full_precision
    def jvp(self, tangent: Params) -> Tensor:
        """J v: `[n, C]` for a tangent of the parameters' shapes. Costs about two forward passes."""
        return outputs_and_change(self.network, self.params, tangent, self.x)[1]

    @_in_full_precision
    def vjp(self, cotangent: Tensor) -> Params:
        """J^T u: parameter-shaped, for a cotangent `[n, C]`. Costs one backward pass."""
        return self._pullback(cotangent)[0]

    @_in_full_precision
    def rows(self, start: int = 0, stop: int | None = None, *, pairs_at_once: int | None = None) -> Params:
        """Rows of the examples from `start` to `stop`: each parameter's name to `[stop - start, C, *its shape]`.

        Args:
            pairs_at_once: pairs of an example and a cotangent that are worked on at once; None takes all of them. It
                bounds the memory of activations, beside the rows themselves.
        """
        start, stop, _ = slice(start, stop).indices(len(self.x))
        some = self.x[start:stop]
        if self.coupled:
            parts = list(self._rows_of_the_batch(start, some.shape[0], pairs_at_once))
            return {name: torch.cat([part[name] for part in parts]).unflatten(0, (len(some), -1)) for name in parts[0]}
        return self._rows_and_outputs(some, pairs_at_once)[0]

    @_in_full_precision
    def dense(self, pairs_at_once: int | None = None) -> Tensor:
        """The whole Jacobian `[n, C, P]`; see `rows`. It is in memory once, beside the part that is worked on."""
        if self.coupled:
            parts = self._rows_of_the_batch(0, self.x.shape[0], pairs_at_once)
            found = _gathered((flatten(part, batch_dims=1) for part in parts), self.outputs.numel())
            return found.unflatten(0, self.outputs.shape)
        outputs = []

        def rows_of(part: Tensor) -> Tensor:
            rows, outputs_of_part = self._rows_and_outputs(part, pairs_at_once)
            outputs.append(outputs_of_part)
            return flatten(rows, batch_dims=2)

        whole = _gathered(map(rows_of, in_chunks(self.x, pairs_at_once)), self.x.shape[0])
        self.outputs = torch.cat(outputs)
        return whole

    def _cotangents(self, start: int, count: int) -> Tensor:
        """Of each output of coupled examples from `start`: 1 there, 0 at all others of the batch. `[count C, n, C]`."""
        n, outputs = self.outputs.shape
        rows = torch.eye(n * outputs, dtype=self.outputs.dtype, device=self.x.device)
        return rows[start * outputs : (start + count) * outputs].unflatten(1, (n, outputs))

    def _rows_of_the_batch(self, start: int, count: int, pairs_at_once: int | None) -> Iterator[Params]:
        """Rows of coupled examples, a backward pass of the whole batch for each: parts of k rows, `[k, *its shape]`."""
        cotangents = self._cotangents(start, count)
        at_once = groups_at_once(pairs_at_once, self.x.shape[0])
        few = at_once is not None and at_once <= FEW_COTANGENTS and self.x.device.type == "cpu"
        if few and not self._is_followed():
            return self._rows_one_by_one(cotangents)
        return (vmap(self.vjp)(part) for part in in_chunks(cotangents, at_once))

    def _rows_one_by_one(self, cotangents: Tensor) -> Iterator[Params]:
        """The same by ordinary reverse mode, which large images are faster in, through PyTorch's own layers."""
        leaves = {name: p.clone().requires_grad_() for name, p in self.params.items()}
        with torch.enable_grad():
            outputs = with_own_layers(self.network)(leaves, self.x)
        for row, cotangent in enumerate(cotangents, 1):
            keep = row < len(cotangents)
            found = torch.autograd.grad(
                outputs, list(leaves.values()), cotangent, retain_graph=keep, materialize_grads=True
            )
            yield {name: g[None] for name, g in zip(leaves, found, strict=True)}

    def _is_followed(self) -> bool:
        """Whether a transform or a graph follows what is computed, from the inputs or the parameters on."""
        return self.x.requires_grad or any(map(is_functorch_wrapped_tensor, (self.x, *self.params.values())))

    def _rows_and_outputs(self, x: Tensor, pairs_at_once: int | None) -> tuple[Params, Tensor]:
        """Rows of examples that are not coupled, and their outputs `[n, C]`."""
        if self._layers_serve and not self._is_followed():
            found = self._by_layers(x, pairs_at_once)
            if found is not None:
                return found
            self._layers_serve = False

        def of_one(example: Tensor) -> tuple[Params, Tensor]:
            output, pullback = vjp(lambda theta: self.network(theta, example.unsqueeze(0)).squeeze(0), self.params)
            basis = torch.eye(output.shape[0], dtype=output.dtype, device=output.device)
            return vmap(lambda cotangent: pullback(cotangent)[0])(basis), output

        try:
            return vmap(of_one, chunk_size=groups_at_once(pairs_at_once, self.output_count))(x)
        except RuntimeError as error:
            if "match the broadcast shape" not in str(error):  # What recurrent layers end in.
                raise
            raise ConfigError(
                "The network has a layer that goes through no vmap, as recurrent ones do. Take coupled=True "
                "(couples_examples = True on the network), which goes without it, if slowly."
            ) from error

    def _by_layers(self, x: Tensor, pairs_at_once: int | None) -> tuple[Params, Tensor] | None:
        """The same by `layer_rows`, or None from the first part on that it does not serve."""
        rows, outputs, start = {}, [], 0
        for part in in_chunks(x, pairs_at_once):
            found = layer_rows(with_own_layers(self.network), self.params, part)
            if found is None or len(part) == len(x):
                return found
            if not rows:
                rows = {name: some.new_empty(len(x), *some.shape[1:]) for name, some in found[0].items()}
            for name, some in found[0].items():
                rows[name][start : start + len(part)] = some
            outputs.append(found[1])
            start += len(part)
        return rows, torch.cat(outputs)


def _gathered(parts: Iterable[Tensor], count: int) -> Tensor:
    """The concatenation of parts of `count` rows in all; each goes to its place before the next is made."""
    whole, start = None, 0
    for part in parts:
        if part.shape[0] == count:
            return part
        if part.requires_grad or is_functorch_wrapped_tensor(part):  # No writing into place there.
            return torch.cat([part, *parts])
        if whole is None:
            whole = part.new_empty(count, *part.shape[1:])
        whole[start : start + part.shape[0]] = part
        start += part.shape[0]
    return whole
