"""Nestings of derivatives and vmap, each a function of (network, theta, x) for three images x `[3, ...]`."""

import torch
import torch.nn.functional as F
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap


def tangents_like(theta, count):
    torch.manual_seed(1)
    return {name: torch.randn(count, *p.shape, dtype=p.dtype) for name, p in theta.items()}


def around(norm, theta, x, memory_format):
    """A network: a convolution, its images in a memory layout, a norm of them, and a head."""
    hidden = F.conv2d(x, theta["convolution"], padding=1)
    if memory_format == "channels_last":
        hidden = hidden.movedim(1, -1).contiguous().movedim(-1, 1)
    return torch.tanh(norm(hidden)).square().mean((-2, -1)) @ theta["head"]


def per_example_jacobian(network, theta, x):
    return vmap(lambda one: jacrev(lambda q: network(q, one[None])[0])(theta))(x)


def whole_jacobian(network, theta, x):
    return jacrev(lambda q: network(q, x))(theta)


def tangent_of_tangents(network, theta, x):
    return jacfwd(lambda q: network(q, x))(theta)


def shared_tangents_reversed(network, theta, x):
    some = tangents_like(theta, 2)
    along = lambda q, z: jvp(lambda p: network(p, x), (q,), (z,))[1]  # noqa: E731
    return grad(lambda q: vmap(lambda z: along(q, z))(some).square().sum())(theta)


def own_tangents_reversed(network, theta, x):
    some = {name: z.unflatten(0, (3, 2)) for name, z in tangents_like(theta, 6).items()}
    along = lambda q, one, z: jvp(lambda p: network(p, one[None])[0], (q,), (z,))[1]  # noqa: E731
    each = lambda q: vmap(lambda one, own: vmap(lambda z: along(q, one, z))(own))(x, some)  # noqa: E731
    return grad(lambda q: each(q).square().sum())(theta)


def reverse_of_reverse(network, theta, x):
    def norm(q):
        outputs, pullback = vjp(lambda p: network(p, x), q)
        return sum(g.square().sum() for g in pullback(torch.ones_like(outputs))[0].values())

    return grad(norm)(theta)


def tasks_at_once(network, theta, x):
    images = torch.stack([x, x.flip(0), 2 * x])
    return vmap(lambda x: shared_tangents_reversed(network, theta, x), randomness="same")(images)


def tasks_with_own_parameters(network, theta, x):
    each = {name: torch.stack([p, 2 * p, -p]) for name, p in theta.items()}
    return vmap(lambda q: reverse_of_reverse(network, q, x))(each), vmap(lambda q: whole_jacobian(network, q, x))(each)


def input_gradient_of_a_tangent(network, theta, x):
    z = {name: t[0] for name, t in tangents_like(theta, 1).items()}
    return grad(lambda x: jvp(lambda p: network(p, x), (theta,), (z,))[1].square().sum())(x)


def forward_of_reverse(network, theta, x):
    z = {name: t[0] for name, t in tangents_like(theta, 1).items()}
    return jvp(grad(lambda p: network(p, x).square().sum()), (theta,), (z,))


NESTINGS = [
    per_example_jacobian,
    whole_jacobian,
    tangent_of_tangents,
    shared_tangents_reversed,
    own_tangents_reversed,
    reverse_of_reverse,
    tasks_at_once,
    tasks_with_own_parameters,
    input_gradient_of_a_tangent,
    forward_of_reverse,
]


def assert_close(found, expected):
    found, expected = torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-11 * b.abs().max()
