"""What every quantity means, as loops over batches of one.

Each function takes `(model, loss_fn, x, y, params)` and returns `{parameter: value}`, computed with
`torch.autograd` alone. Nothing here knows the package under test.
"""

import torch


def assert_close(actual, expected, rtol=1e-9, scale=None):
    """Relative to the largest magnitude of `scale`, by default of the expected tensor.

    Magnitudes below 0.01 count as 0.01. Dictionaries are compared key by key.
    """
    if isinstance(expected, dict):
        for p, value in expected.items():
            assert_close(actual[p], value, rtol)
    else:
        scale = expected if scale is None else scale
        bound = rtol * max([0.01, *scale.abs().flatten().tolist()])
        torch.testing.assert_close(actual, expected, rtol=0, atol=bound, check_dtype=False)


def one(batch, n):
    """Sample n as a batch of one; a tuple gives a tuple."""
    return tuple(one(t, n) for t in batch) if isinstance(batch, tuple) else batch[n : n + 1]


def samples(x, y):
    size = len(x[0]) if isinstance(x, tuple) else len(x)
    return [(one(x, n), one(y, n)) for n in range(size)]


def derivative(value, inputs, create_graph=False):
    return torch.autograd.grad(
        value, inputs, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )


def by_parameter(params, values):
    return dict(zip(params, values, strict=True))


def grad(model, loss_fn, x, y, params, create_graph=False):
    """The gradient of the loss."""
    return by_parameter(params, derivative(loss_fn(model(x), y), params, create_graph))


def loop(quantity, model, loss_fn, x, y, params, **options):
    """The quantity of each sample's own loss, stacked."""
    rows = [quantity(model, loss_fn, a, b, params, **options) for a, b in samples(x, y)]
    return {p: torch.stack([row[p] for row in rows]) for p in params}


def matrix(rows):
    return rows.reshape(len(rows), -1)


# First order.


def batch_grad(model, loss_fn, x, y, params, create_graph=False):
    return loop(grad, model, loss_fn, x, y, params, create_graph=create_graph)


def batch_l2(*problem):
    return {p: matrix(rows).square().sum(1) for p, rows in batch_grad(*problem).items()}


def sum_grad_squared(*problem):
    return {p: rows.square().sum(0) for p, rows in batch_grad(*problem).items()}


def variance(*problem, unbiased=False, create_graph=False):
    rows = batch_grad(*problem, create_graph=create_graph)
    return {p: rows[p].var(0, correction=int(unbiased)) for p in rows}


def total_variance_grad(model, loss_fn, x, y, params):
    """The gradient of the variance summed over all elements of all parameters."""
    parts = variance(model, loss_fn, x, y, params, create_graph=True).values()
    return by_parameter(params, derivative(sum(part.sum() for part in parts), params))


def clipped_grad_sum(*problem, max_norm):
    """Each sample's whole gradient, scaled to norm `max_norm` where it is longer; then the sum."""
    rows = batch_grad(*problem)
    norms = torch.cat([matrix(r) for r in rows.values()], 1).norm(dim=1)
    factors = torch.where(norms > max_norm, max_norm / norms, torch.ones_like(norms))
    return {p: torch.einsum("n,n...->...", factors, r) for p, r in rows.items()}


# Second order. The outputs of a model are one tensor or a tuple of them.


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def split(vector, params):
    """The entries of a vector over all parameters, in the shape of each."""
    pieces = vector.split([p.numel() for p in params])
    return by_parameter(params, [piece.view_as(p) for p, piece in zip(params, pieces, strict=True)])


def jacobian(outputs, params):
    """Dense: one row per element of the outputs, one column per element of the parameters."""
    return torch.stack([flat(derivative(f, params)) for f in flat(as_tuple(outputs))])


def loss_hessian(loss_fn, outputs, y):
    """Dense Hessian of the loss in the outputs of the model."""
    leaves = tuple(f.detach().requires_grad_() for f in as_tuple(outputs))
    loss = loss_fn(leaves if isinstance(outputs, tuple) else leaves[0], y)
    slopes = flat(derivative(loss, leaves, create_graph=True))
    return torch.stack([flat(derivative(slope, leaves)) for slope in slopes])


def ggn(model, loss_fn, x, y, params):
    """J^T H J: the whole generalized Gauss-Newton matrix of the loss, over all parameters."""
    outputs = model(x)
    J, H = jacobian(outputs, params), loss_hessian(loss_fn, outputs, y)
    return J.T @ H @ J


def diag_ggn(*problem):
    return split(ggn(*problem).diagonal(), problem[-1])


def batch_diag_ggn(*problem):
    return loop(diag_ggn, *problem)


def hessian(model, loss_fn, x, y, params):
    """The whole Hessian of the loss, over all parameters."""
    slopes = flat(derivative(loss_fn(model(x), y), params, create_graph=True))
    return torch.stack([flat(derivative(slope, params)) for slope in slopes])


def diag_hessian(*problem):
    return split(hessian(*problem).diagonal(), problem[-1])


def batch_diag_hessian(*problem):
    return loop(diag_hessian, *problem)


def param_jacobian(model, x, params):
    """`[N, *out, *p]`: every output of every sample, differentiated in every parameter."""
    f = model(x)
    rows = zip(*(derivative(element, params) for element in f.reshape(-1)), strict=True)
    stacks = [torch.stack(row) for row in rows]
    return by_parameter(params, [s.view(*f.shape, *s.shape[1:]) for s in stacks])
