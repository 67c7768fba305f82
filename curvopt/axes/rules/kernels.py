"""Convolutions, pooling, normalization and recurrent kernels."""

from __future__ import annotations

from torch import Tensor

from curvopt.axes.lattice import State, align, constant, join_all, merge, mixed
from curvopt.axes.rules.base import Call, Refuse, Result, Rule, ones, rule


@rule("convolution _convolution")
def convolution(call: Call) -> Result:
    """A channel of the output depends on all positions of the channels of its group."""
    x, weight, bias = call.op.args[:3]
    transposed, groups = call.arg("transposed"), call.arg("groups")
    ndim, channels = x.ndim, call.outputs[0].shape[1]
    data = call.merged(x, range(2, ndim))
    if data is not None:
        if groups > 1 and data.shape[1] > 1:
            data = data.reshape(data.shape[0], groups, -1).flatten(2)
            data = merge(data, [2]).squeeze(2).repeat_interleave(channels // groups, 1)
            data = data.reshape(*data.shape, *[1] * (ndim - 2))
        else:
            data = merge(data, [1])
    kernel = call.owners(weight)
    if kernel is not None:
        kernel = merge(kernel, range(0 if transposed else 1, ndim)).transpose(0, 1)
    added = call.owners(bias)
    return ones(join_all(data, kernel, None if added is None else _per_channel(added, ndim)))


def _per_channel(owners: Tensor, ndim: int) -> Tensor:
    return owners.reshape([1, -1] + [1] * (ndim - 2))


def _pool(dims: int) -> Rule:
    def pool(call: Call) -> Result:
        x = call.x
        owners = call.merged(x, range(x.ndim - dims, x.ndim))
        return [ones(owners)] * len(call.outputs)

    return pool


rule("upsample_linear1d")(_pool(1))
rule(
    "avg_pool2d max_pool2d_with_indices _adaptive_avg_pool2d "
    "adaptive_max_pool2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa"
)(_pool(2))
rule(
    "avg_pool3d max_pool3d_with_indices _adaptive_avg_pool3d adaptive_max_pool3d "
    "upsample_trilinear3d"
)(_pool(3))


@rule(
    "affine_grid_generator grid_sampler_2d grid_sampler_3d fractional_max_pool2d col2im "
    "max_unpool2d max_unpool3d "
    "max_pool2d_with_indices_backward max_pool3d_with_indices_backward avg_pool2d_backward "
    "avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward "
    "adaptive_max_pool2d_backward upsample_nearest1d_backward upsample_nearest2d_backward "
    "upsample_linear1d_backward upsample_bilinear2d_backward upsample_bicubic2d_backward "
    "reflection_pad1d_backward reflection_pad2d_backward replication_pad1d_backward "
    "replication_pad2d_backward _thnn_fused_lstm_cell _thnn_fused_gru_cell"
)
def by_batch(call: Call) -> Result:
    """Entry n of the first axis depends on entries n of all inputs, and on all that is in them."""
    size = call.outputs[0].shape[0]
    total: Tensor | None = None
    for ref in call.inputs:
        owners = call.owners(ref)
        if owners is None:
            continue
        if ref.ndim < 2 or ref.shape[0] != size:
            owners = merge(owners, range(ref.ndim)).reshape(1)
        else:
            owners = merge(owners, range(1, ref.ndim)).reshape(-1)
        total = join_all(total, owners)
    if total is None or any(ref.shape[:1] != (size,) for ref in call.outputs):
        raise Refuse
    # torch accepts images without batch axis where the first axis is that of channels.
    if (
        call.op.name.startswith(
            (
                "max_pool",
                "avg_pool",
                "_adaptive",
                "adaptive",
                "reflection",
                "replication",
                "col2im",
                "max_unpool",
            )
        )
        and call.x.ndim < 4
    ):
        total = merge(total, [0])
    return [State(total.reshape(-1, *[1] * (ref.ndim - 1))) for ref in call.outputs]


@rule("native_layer_norm _fused_rms_norm", ragged=True)
def layer_norm(call: Call) -> Result:
    """Normalized over the last dims."""
    x, over = call.x, len(call.op.args[1])
    state = call.state(x)
    ragged = None if state is None else state.ragged
    others = [s.ragged for s in map(call.state, call.inputs[1:]) if s is not None]
    if (ragged is not None and -ragged[0] <= over) or any(o is not None for o in others):
        raise Refuse
    owners = call.merged(x, range(x.ndim - over, x.ndim))
    scaled = [align(o, x.ndim) for o in map(call.owners, call.inputs[1:]) if o is not None]
    statistics = constant(x.ndim) if owners is None else owners
    result = join_all(owners, *scaled)
    return [
        None if result is None else State(result, ragged),
        *(
            State(statistics, ragged) if r.ndim == x.ndim else mixed(r.ndim)
            for r in call.outputs[1:]
        ),
    ]


@rule("native_group_norm")
def group_norm(call: Call) -> Result:
    """Normalized within an entry of the batch; here over all its groups."""
    x = call.x
    owners = call.merged(x, range(1, x.ndim))
    scaled = [_per_channel(o, x.ndim) for o in map(call.owners, call.inputs[1:]) if o is not None]
    statistics = constant(2) if owners is None else owners.reshape(-1, 1)
    return [ones(join_all(owners, *scaled)), State(statistics), State(statistics)]


@rule(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "cudnn_batch_norm miopen_batch_norm _batch_norm_with_update _batch_norm_no_update"
)
def batch_norm(call: Call) -> Result:
    """In training, every channel is normalized over the batch."""
    x, name = call.x, call.op.name
    training = call.arg("training") if call.has("training") else name.endswith("with_update")
    owners = call.owners(x)
    if training and owners is not None:
        owners = merge(owners, [d for d in range(x.ndim) if d != 1])
        # Running statistics are updated without a word in the op's schema.
        for statistic in ("running_mean", "running_var"):
            ref = call.arg(statistic) if call.has(statistic) else None
            if ref is not None:
                call.replay.put(ref, mixed(ref.ndim), write=True)
    read = [call.arg("weight"), call.arg("bias")]
    if not training:
        read += [call.arg("running_mean"), call.arg("running_var")]
    scaled = [_per_channel(o, x.ndim) for o in map(call.owners, read) if o is not None]
    result = ones(join_all(owners, *scaled))
    return [result, *(mixed(r.ndim) if training else None for r in call.outputs[1:])]


def _recurrent(call: Call, batch: int, states: tuple[str, str]) -> Result:
    """Sequences of three dims, hidden states and cells [..., batch, features]."""
    x = call.x
    size = x.shape[batch]
    total = call.merged(x, [d for d in range(3) if d != batch])
    total = None if total is None else total.reshape(-1)
    hidden = [call.arg(name) for name in states]
    for ref in call.inputs[1:]:
        owners = call.owners(ref)
        if owners is None:
            continue
        if not any(ref is h for h in hidden) or ref.ndim not in (2, 3) or ref.shape[-2] != size:
            raise Refuse  # weights that samples have a part in
        others = [d for d in range(ref.ndim) if d != ref.ndim - 2]
        total = join_all(total, merge(owners, others).reshape(-1))
    if total is None:
        return None
    results: list[State | None] = []
    for n, ref in enumerate(call.outputs):
        dim = batch if n == 0 else ref.ndim - 2
        if ref.ndim in (2, 3) and ref.shape[dim] == size:
            results.append(State(total.reshape([-1 if d == dim else 1 for d in range(ref.ndim)])))
        else:
            results.append(mixed(ref.ndim))
    return results


@rule("mkldnn_rnn_layer")
def mkldnn_rnn(call: Call) -> Result:
    """Always time first, whatever `batch_first` says."""
    return _recurrent(call, 1, ("hx_", "cx_"))


@rule("_cudnn_rnn miopen_rnn")
def cudnn_rnn(call: Call) -> Result:
    """Packed sequences (with batch sizes) have no batch axis."""
    if call.arg("batch_sizes"):
        raise Refuse
    return _recurrent(call, 0 if call.arg("batch_first") else 1, ("hx", "cx"))
