"""One row per op and rule: a function, its inputs, and whether samples on dim 0 stay apart."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

aten = torch.ops.aten


def real(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def indices(*shape, high=4):
    return torch.randint(high, shape)


def bits(*shape):
    return torch.rand(*shape) < 0.6


@dataclass
class Row:
    """A function of the inputs.

    Attributes:
        apart: with samples on dim 0 of the first input, no element of the first output is mixed.
    """

    function: object
    inputs: list = field(default_factory=list)
    apart: bool = True


def row(function, *inputs, apart=True):
    return Row(function, list(inputs), apart)


def inner(function, *wrt):
    """The gradients of a function's weighted sum, as backward kernels compute them."""

    def of(*inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            y = function(*leaves)
            weights = torch.linspace(1.0, 2.0, y.numel(), dtype=y.dtype).reshape(y.shape)
            total = (y * weights).sum()
        return torch.autograd.grad(total, [leaves[n] for n in wrt or (0,)])

    return of


def seeds():
    torch.manual_seed(0)


seeds()
X, Y = real(4, 4, 4), real(4, 4, 4)
M = real(4, 4)
IMAGES = real(4, 4, 4, 4)
VOLUME = real(2, 2, 4, 4, 4)
PICK, B = indices(4), bits(4)
IJ = indices(4, 4)
OPEN = B.clone()
OPEN[0] = True

ROWS = {
    # element by element
    "add": row(torch.add, X, M),
    "where": row(lambda x, y: torch.where(x > 0, x, y), X, Y),
    "masked_fill": row(lambda x, b: x.masked_fill(b[:, None, None], 0.0), X, B),
    "clamp": row(lambda x, y: x.clamp(y, y + 1), X, Y),
    "lerp": row(torch.lerp, X, Y, M),
    "prelu": row(lambda x: F.prelu(x, torch.tensor([0.5], dtype=x.dtype)), X),
    "complex": row(lambda x, y: torch.complex(x, y).conj().angle(), X, Y),
    "polar": row(lambda x, y: torch.view_as_real(torch.polar(x.abs(), y)), X, Y),
    "bernoulli": row(lambda x: torch.bernoulli(x.sigmoid()), X),
    "copy": row(lambda x, y: torch.zeros_like(x).copy_(y[0]), X, Y),
    "same": row(lambda x: x.clone().to(torch.float32).detach().contiguous(), X),
    "alias": row(lambda x: [aten.alias(x), aten.lift_fresh(x), aten.lift(x)], X),
    "copies": row(lambda x: [aten.detach_copy(x), aten.alias_copy(x), aten.lift_fresh_copy(x)], X),
    "conj": row(lambda x: torch.view_as_complex(x).conj().resolve_conj(), real(4, 4, 2)),
    "imag": row(lambda x: torch.view_as_complex(x).conj().imag.resolve_neg(), real(4, 4, 2)),
    "conj_physical": row(lambda x: torch.view_as_complex(x).conj_physical(), real(4, 4, 2)),
    "dropout": row(lambda x: F.dropout(x, 0.5), X),
    "fused_dropout": row(lambda x: aten.native_dropout(x, 0.5, True)[0], X),
    "triangles": row(lambda x: x.tril() + x.triu(1) * 2, X),
    "made": row(
        lambda x: [
            torch.empty_like(x).zero_(),
            torch.zeros_like(x),
            torch.ones_like(x),
            torch.full_like(x, 2.0),
            torch.rand_like(x),
            torch.randn_like(x),
            torch.randint_like(x, 3),
            x.new_empty(2).zero_(),
            x.new_zeros(2),
            x.new_ones(2),
            x.new_full((2,), 3.0),
            x.new_empty_strided((2,), (1,)).zero_(),
            x.clone().uniform_(),
            x.clone().random_(5),
            x.clone().exponential_(),
            x.clone().geometric_(0.5),
            x.clone().log_normal_(),
            x.clone().cauchy_(),
        ],
        X,
    ),
    "reads": row(lambda x: [x * bool(x.sum() > 1e9), x * torch.equal(x, x)], X),
    "item": row(lambda x: x * float(x[0, 0, 0].item() > 1e9), X),
    "storage": row(lambda x: x * aten._has_same_storage_numel(x, x), X),
    "normal": row(lambda x, y: [torch.normal(x, y.abs()), torch.normal(x, 1.0)], X, Y),
    "normal_": row(lambda x: x.clone().normal_(), X),
    "fill": row(lambda x: x.clone().fill_(x[0, 0, 0]), X, apart=True),
    "view_as": row(lambda x: torch.view_as_real(torch.view_as_complex(x) * 2j), real(4, 4, 2)),
    # movement
    "permute": row(lambda x: x.permute(2, 0, 1).transpose(0, 1), X),
    "t": row(lambda x: x.t(), M),
    "unsqueeze": row(lambda x: x.unsqueeze(1).squeeze(1).unsqueeze(-1).squeeze(), X),
    "expand": row(lambda x: x[:, :1].expand(4, 4, 4), X),
    "slice": row(lambda x: x[:, 1:3, ::2], X),
    "select": row(lambda x: x[:, 1], X),
    "split": row(lambda x: [*x.split(3, 1), *x.split([1, 3], 2)], X),
    "unsafe_split": row(
        lambda x: [*x.unsafe_split(2, 1), *x.unsafe_split_with_sizes([1, 3], 2)], X
    ),
    "unbind": row(lambda x: x.unbind(1), X),
    "diagonal": row(lambda x: x.diagonal(1, 1, 2), X),
    "unfold": row(lambda x: x.unfold(1, 2, 1), X),
    "flip": row(lambda x: x.flip(0, 2), X),
    "roll": row(lambda x: x.roll((1, 2), (0, 1)), X),
    "repeat": row(lambda x: x.repeat(2, 1, 2), X),
    "rot90": row(lambda x: x.rot90(1, (1, 2)), X),
    "pad": row(lambda x: F.pad(x, (1, 2, 0, 1)), X),
    "view_copies": row(
        lambda x: [
            aten.squeeze_copy(x[:, :1]),
            aten.permute_copy(x, (1, 0, 2)),
            aten.t_copy(x[0]),
            aten.transpose_copy(x, 0, 1),
            aten.unsqueeze_copy(x, 0),
            aten.slice_copy(x, 1, 1, 3),
            aten.expand_copy(x[:, :1], (4, 4, 4)),
            aten.select_copy(x, 1, 0),
            aten.view_copy(x, (16, 4)),
            aten._reshape_copy(x, (16, 4)),
        ],
        X,
        apart=True,
    ),
    "im2col": row(lambda x: F.unfold(x, 2, padding=1), IMAGES),
    "nearest": row(
        lambda x: [F.interpolate(x, scale_factor=2.0), F.interpolate(x[0], scale_factor=2.0)],
        IMAGES,
    ),
    "nearest3d": row(lambda x: F.interpolate(x, scale_factor=2.0), VOLUME),
    "reflection": row(
        lambda x: [F.pad(x, (1, 1, 1, 1), "reflect"), F.pad(x[0], (1, 1), "reflect")], IMAGES
    ),
    "reflection3d": row(lambda x: F.pad(x, (1, 1, 1, 1, 1, 1), "reflect"), VOLUME),
    "replication": row(
        lambda x: [F.pad(x, (1, 1, 1, 1), "replicate"), F.pad(x[0], (1, 1), "replicate")], IMAGES
    ),
    "replication3d": row(lambda x: F.pad(x, (1, 1, 1, 1, 1, 1), "replicate"), VOLUME),
    "pixel_shuffle": row(
        lambda x: [F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 2), F.channel_shuffle(x, 2)], IMAGES
    ),
    "view": row(lambda x: [x.view(16, 4), x.view(4, 2, 8), x.view(2, 2, 16)], X),
    "view_bits": row(lambda x: x.view(torch.int64), X, apart=False),
    "reshape": row(
        lambda x: [
            x.transpose(0, 1).reshape(16, 4),
            aten._unsafe_view(x, (16, 4)),
            aten._reshape_alias(x, (16, 4), (4, 1)),
        ],
        X,
    ),
    "as_strided": row(lambda x: x.as_strided((4, 5), (16, 2), 3), X),
    "cat": row(lambda x, y: torch.cat([x, y[:2], torch.empty(0, dtype=x.dtype)]), X, Y),
    "stack": row(lambda x, y: torch.stack([x, y], 1), X, Y),
    # reductions
    "sums": row(lambda x: [x.mean(1), x.sum((1, 2)), x.nansum(-1), x.amax(1), x.amin(2)], X),
    "deviations": row(
        lambda x: [x.var(1), x.std(1), *torch.var_mean(x, 1), *torch.std_mean(x, 1)], X
    ),
    "prod": row(lambda x: [x.prod(1), (x > 0).any(1), (x > 0).all(1), x.count_nonzero(1)], X),
    "norms": row(lambda x: [x.norm(dim=1), torch.linalg.vector_norm(x, dim=1), x.logsumexp(1)], X),
    "norm_kernel": row(lambda x: aten.norm(x, 2, [1]), X),
    "extremes": row(
        lambda x: [x.argmax(1), x.argmin(1), *x.max(1), *x.min(1), *torch.aminmax(x, dim=1)], X
    ),
    "order": row(
        lambda x: [
            *x.median(1),
            *x.nanmedian(1),
            *x.mode(1),
            *x.kthvalue(2, 1),
            *x.topk(2, 1),
            *x.sort(1),
            x.argsort(1),
        ],
        X,
    ),
    "cumulative": row(
        lambda x: [
            x.cumsum(1),
            x.cumprod(1),
            x.logcumsumexp(1),
            aten._logcumsumexp(x, 1),
            *x.cummax(1),
            *x.cummin(1),
        ],
        X,
    ),
    "softmax": row(
        lambda x: [
            x.softmax(1),
            x.log_softmax(1),
            aten._safe_softmax(x, 1),
        ],
        X,
    ),
    "softmax_backward": row(
        lambda x, y: [
            aten._softmax_backward_data(x, y, 1, torch.float64),
            aten._log_softmax_backward_data(x, y, 1, torch.float64),
        ],
        X,
        Y,
    ),
    "glu": row(lambda x: F.glu(x, 1), X),
    "all_of_it": row(lambda x: [x.max(), x.sum(), x.median(), x.std()], X, apart=False),
    "solve-general": row(lambda x, y: torch.linalg.solve(spd(x), y), X, Y),
    "solve-shared": row(lambda x, y: torch.linalg.solve(spd(y), x), X, M),
    "solve-columns": row(lambda x, y: torch.linalg.solve(spd(y), x.mT), M, real(4, 4)),
    "solve-triangular-columns": row(
        lambda x, y: torch.linalg.solve_triangular(spd(y).tril(), x.mT, upper=False), M, real(4, 4)
    ),
    "solve-triangular-right": row(
        lambda x, y: torch.linalg.solve_triangular(spd(y).tril(), x, upper=False, left=False),
        M,
        real(4, 4),
    ),
    "cholesky-solve-columns": row(
        lambda x, y: torch.cholesky_solve(x.mT, torch.linalg.cholesky(spd(y))), M, real(4, 4)
    ),
    "solve-rows-mix": row(lambda x, y: torch.linalg.solve(spd(y), x), M, real(4, 4), apart=False),
    "solve-vectors": row(lambda x, y: torch.linalg.solve(spd(x), y), X, M),
    "solve-of-one": row(lambda x, y: torch.linalg.solve(spd(x), y), M, real(4), apart=False),
    "solve-parts": row(lambda x, y: aten._linalg_solve_ex(spd(x), y), X, M),
    "solve-right": row(lambda x, y: torch.linalg.solve(spd(x), y, left=False), X, Y),
    "cross": row(lambda x, y: torch.linalg.cross(x, y), real(4, 3), real(4, 3)),
    "cross-shared": row(lambda x, y: torch.linalg.cross(x, y), real(4, 3), real(1, 3)),
    "cross-dim-0": row(
        lambda x, y: torch.linalg.cross(x, y, dim=0), real(3, 4), real(3, 4), apart=False
    ),
    "bucketize": row(lambda x, y: torch.bucketize(x, y.sort().values), X, real(4)),
    "searchsorted": row(lambda x, y: torch.searchsorted(y.sort().values, x), X, real(4)),
    "searchsorted-rows": row(lambda x, y: torch.searchsorted(x.sort().values, y), X, Y),
    "searchsorted-of-all": row(
        lambda x, y: torch.searchsorted(x.sort().values, y), real(4), X, apart=False
    ),
    "isin": row(lambda x, y: torch.isin(x, y), indices(4, 4), indices(2)),
    "isin-of-all": row(lambda x, y: torch.isin(y, x), indices(4), indices(4), apart=False),
    "diag-embed": row(lambda x: (x.diag_embed(), x.diag_embed(1, 0, 2)), M),
    "diag-embed-of-a-vector": row(lambda x: x.diag_embed(), real(4)),
    "slice-scatter": row(lambda x, y: x.slice_scatter(y, 1, 0, 2), M, real(4, 2)),
    "slice-scatter-samples": row(lambda x, y: x.slice_scatter(y, 0, 1, 3), M, real(2, 4)),
    "select-scatter": row(lambda x, y: x.select_scatter(y, 1, 2), M, real(4)),
    "diagonal-scatter": row(lambda x, y: x.diagonal_scatter(y), M, real(4)),
    "renorm": row(lambda x: x.renorm(2, 0, 0.1), X),
    "multinomial": row(lambda x: torch.multinomial(x.exp(), 2), M),
    "matrices": row(
        lambda x: [
            torch.linalg.cholesky(spd(x)),
            torch.linalg.inv(spd(x)),
            torch.linalg.det(x),
            *torch.linalg.slogdet(x),
            *torch.linalg.qr(spd(x)),
            torch.linalg.svdvals(x),
            torch.linalg.eigvalsh(spd(x)),
            torch.linalg.matrix_exp(x),
            *torch.linalg.lu(spd(x)),
            torch.linalg.lu_factor(spd(x))[0],
            aten.cholesky(spd(x)),
            aten.cholesky_inverse(torch.linalg.cholesky(spd(x))),
        ],
        X,
    ),
    "solve": row(
        lambda x, y: [
            torch.linalg.solve_triangular(torch.linalg.cholesky(spd(x)), y, upper=False),
            torch.cholesky_solve(y, torch.linalg.cholesky(spd(x))),
        ],
        X,
        Y,
    ),
    "fft": row(
        lambda x: [
            torch.fft.rfft(x),
            torch.fft.fft(torch.complex(x, x)),
            torch.fft.fft(x, dim=1),
            torch.fft.irfft(torch.fft.fft(x)),
        ],
        X,
    ),
    "weight_norm": row(lambda v, g: torch._weight_norm(v, g, 0), M, real(4, 1)),
    # contractions
    "mm": row(torch.mm, M, real(4, 4)),
    "addmm": row(torch.addmm, real(4, 1), M, real(4, 4)),
    "bmm": row(torch.bmm, X, Y),
    "baddbmm": row(torch.baddbmm, X, Y, real(4, 4, 4)),
    "mv": row(lambda m, v, w: [torch.mv(m, v), torch.addmv(w, m, v)], M, real(4), real(4)),
    "dot": row(lambda x, y: [torch.dot(x, y), torch.vdot(x, y)], real(4), real(4), apart=False),
    "bilinear": row(lambda x, y, w: F.bilinear(x, y, w), M, real(4, 4), X),
    "cdist": row(lambda x, y: [torch.cdist(x, y), aten._euclidean_dist(x, y)], X, Y),
    "attention": row(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v), IMAGES, IMAGES + 1, IMAGES * 2
    ),
    "attention_masked": row(
        lambda q, k, m: F.scaled_dot_product_attention(q, k, k, attn_mask=m),
        IMAGES,
        IMAGES + 1,
        real(4, 1, 4, 4),
    ),
    "attention_grouped": row(
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        IMAGES,
        real(4, 2, 4, 4),
    ),
    # kernels
    "conv1d": row(lambda x, w, b: F.conv1d(x, w, b, padding=1), X, real(4, 4, 3), real(4)),
    "conv_grouped": row(lambda x, w: F.conv1d(x, w, groups=2), X, real(4, 2, 3)),
    "conv_transposed": row(lambda x, w: F.conv_transpose1d(x, w), X, real(4, 2, 3)),
    "conv_transposed_grouped": row(
        lambda x, w: F.conv_transpose1d(x, w, groups=2), X, real(4, 2, 3)
    ),
    "convolution": row(
        lambda x, w: aten._convolution(
            x, w, None, [1], [0], [1], False, [0], 1, False, False, False, False
        ),
        X,
        real(4, 4, 3),
    ),
    "pool1d": row(
        lambda x: [
            F.avg_pool1d(x, 2),
            F.max_pool1d(x, 2),
            F.adaptive_avg_pool1d(x, 2),
            *F.adaptive_max_pool1d(x, 2, return_indices=True),
            F.interpolate(x, size=6, mode="linear"),
        ],
        X,
    ),
    "pool2d": row(
        lambda x: [
            F.avg_pool2d(x, 2),
            *F.max_pool2d(x, 2, return_indices=True),
            F.adaptive_avg_pool2d(x, 2),
            *F.adaptive_max_pool2d(x, 2, return_indices=True),
            F.interpolate(x, size=6, mode="bilinear"),
            F.interpolate(x, size=6, mode="bicubic"),
            F.interpolate(x, size=6, mode="bilinear", antialias=True),
            F.interpolate(x, size=6, mode="bicubic", antialias=True),
        ],
        IMAGES,
    ),
    "pool3d": row(
        lambda x: [
            F.avg_pool3d(x, 2),
            *F.max_pool3d(x, 2, return_indices=True),
            F.adaptive_avg_pool3d(x, 2),
            *F.adaptive_max_pool3d(x, 2, return_indices=True),
            F.interpolate(x, size=(6, 6, 6), mode="trilinear"),
        ],
        VOLUME,
    ),
    "affine_grid": row(
        lambda t: F.affine_grid(t, [4, 2, 3, 3], align_corners=False), real(4, 2, 3)
    ),
    "grid_sample": row(
        lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), IMAGES, real(4, 3, 3, 2)
    ),
    "grid_sample3d": row(
        lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), VOLUME, real(2, 2, 2, 2, 3)
    ),
    "fractional": row(
        lambda x: F.fractional_max_pool2d(
            x, 2, output_size=2, _random_samples=torch.full((4, 4, 2), 0.3, dtype=x.dtype)
        ),
        IMAGES,
    ),
    "fold": row(lambda x: F.fold(x, (4, 4), 2, stride=2), real(4, 16, 4), apart=False),
    "unpool": row(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), IMAGES),
    "unpool3d": row(lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2), VOLUME),
    "pool_backward": row(
        inner(lambda x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2) + F.adaptive_max_pool2d(x, 2)),
        IMAGES,
    ),
    "inference": row(lambda x, w: inference(x, w), X, M),
    "adaptive_backward": row(
        inner(lambda x: F.adaptive_avg_pool2d(x, 2) * F.adaptive_avg_pool2d(x, 2)), IMAGES
    ),
    "pool3d_backward": row(
        inner(lambda x: F.max_pool3d(x, 2) + F.avg_pool3d(x, 2) * F.adaptive_avg_pool3d(x, 2)),
        VOLUME,
    ),
    "upsample_backward": row(
        inner(
            lambda x: (
                F.interpolate(x, size=6)
                * F.interpolate(x, size=6, mode="bilinear")
                * F.interpolate(x, size=6, mode="bicubic")
            )
        ),
        IMAGES,
    ),
    "upsample1d_backward": row(
        inner(lambda x: F.interpolate(x, size=6) * F.interpolate(x, size=6, mode="linear")), X
    ),
    "pad_backward": row(
        inner(lambda x: F.pad(x, (1, 1, 1, 1), "reflect") * F.pad(x, (1, 1, 1, 1), "replicate")),
        IMAGES,
    ),
    "pad1d_backward": row(
        inner(lambda x: F.pad(x, (1, 1), "reflect") * F.pad(x, (1, 1), "replicate")),
        X,
        apart=False,
    ),
    "images_without_batch": row(
        inner(lambda x: F.max_pool2d(x, 2, 1) + F.avg_pool2d(x, 2, 1)), X, apart=False
    ),
    "layer_norm": row(lambda x, w, b: F.layer_norm(x, (4,), w, b), X, real(4), real(4)),
    "native_layer_norm": row(lambda x: aten.native_layer_norm(x, (4, 4), None, None, 1e-5), X),
    "rms_norm": row(lambda x, w: F.rms_norm(x, (4,), w), X, real(4)),
    "group_norm": row(lambda x, w, b: F.group_norm(x, 2, w, b), X, real(4), real(4)),
    "batch_norm": row(lambda x, w, m: F.batch_norm(x, m, w.abs(), w), X, real(4), real(4)),
    "batch_norm_training": row(
        lambda x: F.batch_norm(x, None, None, training=True), X, apart=False
    ),
    "batch_norm_running": row(lambda x, y: running(x, y), X, Y, apart=False),
    "batch_norm_legit": row(
        lambda x: [
            *aten._native_batch_norm_legit(x, None, None, one(0), one(1), False, 0.1, 1e-5)[:1],
            *aten._native_batch_norm_legit_no_training(x, None, None, one(0), one(1), 0.1, 1e-5)[
                :1
            ],
            aten._batch_norm_no_update(x, None, None, one(0), one(1), 0.1, 1e-5)[0],
        ],
        X,
    ),
    "batch_norm_update": row(
        lambda x: aten._batch_norm_with_update(x, one(1), one(0), one(0), one(1), 0.1, 1e-5)[0],
        X,
        apart=False,
    ),
    "lstm32": row(lambda x: lstm(x, False), real(4, 3, 4, dtype=torch.float32), apart=False),
    "lstm32_batch_first": row(lambda x: lstm(x, True), real(3, 4, 4, dtype=torch.float32)),
    "lstm32_states": row(
        lambda h, x: torch.nn.LSTM(4, 4, dtype=torch.float32)(x, (h, h * 2))[0][:, 0],
        real(1, 4, 4, dtype=torch.float32),
        real(3, 4, 4, dtype=torch.float32),
    ),
    "lstm32_weights": row(
        lambda w, x: torch.func.functional_call(
            torch.nn.LSTM(4, 1, bias=False), {"weight_ih_l0": w}, (x,)
        )[0],
        real(4, 4, dtype=torch.float32),
        real(3, 4, 4, dtype=torch.float32),
        apart=False,
    ),
    "lstm_cell": row(lambda x, h: cells(x, h), M, real(4, 4)),
    # reading by an index
    "index": row(lambda x, i: x[i], X, PICK, apart=True),
    "index_two": row(lambda x, i: [x[i, i], x[:, i, i], x[i, :, i]], X, PICK),
    "index_grid": row(lambda x, i: x[:, i], X, IJ),
    "index_mask": row(lambda x, b: x[b], X, B),
    "index_mask2": row(lambda x: x[x[..., 0] > 0] * 2, X),
    "unsafe_index": row(lambda x, i: aten._unsafe_index(x, [i]), X, PICK),
    "index_select": row(lambda x, i: x.index_select(1, i), X, PICK),
    "embedding": row(lambda i, w: F.embedding(i, w), IJ, M),
    "gather": row(lambda x, i: x.gather(1, i), M, IJ),
    "gather_part": row(lambda x, i: x.gather(1, i), M, indices(2, 3)),
    "take": row(lambda x, i: torch.take(x, i), M, indices(4, high=16)),
    "masked_select": row(lambda x, b: torch.masked_select(x, b), M, bits(4, 4)),
    "nonzero": row(lambda b: b.nonzero(), bits(4, 4)),
    "nonzero_read": row(lambda x, b: x[b.nonzero()[:, 0]], X, OPEN),
    # writing by an index
    "scatter": row(lambda x, i, y: x.scatter(1, i, y), M, IJ, real(4, 4)),
    "scatter_value": row(lambda x, i: x.scatter(1, i, 2.0), M, IJ),
    "scatter_rows": row(lambda x, i, y: x.scatter(0, i, y), M, indices(2, 3), real(4, 4)),
    "scatter_add": row(lambda x, i, y: x.scatter_add(1, i, y), M, IJ, real(4, 4)),
    "scatter_reduce": row(lambda x, i, y: x.scatter_reduce(1, i, y, "amax"), M, IJ, real(4, 4)),
    "index_add": row(lambda x, i, y: x.index_add(1, i, y), X, PICK, Y),
    "index_add_rows": row(lambda x, i, y: x.index_add(0, i, y), X, PICK, Y),
    "index_copy": row(lambda x, y: x.index_copy(1, torch.tensor([2, 0, 1, 3]), y), X, Y),
    "index_fill": row(
        lambda x, i, v: [x.index_fill(1, i, 2.0), x.index_fill(1, i, v)],
        X,
        PICK,
        torch.tensor(1.5, dtype=torch.float64),
    ),
    "index_put": row(lambda x, y: x.index_put((torch.tensor([1, 0]),), y[:2]), X, Y),
    "index_put_add": row(
        lambda x, y: x.index_put((torch.tensor([1, 1]),), y[:2], accumulate=True), X, Y
    ),
    "index_put_impl": row(
        lambda x, y: aten._index_put_impl_(x.clone(), [torch.tensor([1, 0])], y[:2]), X, Y
    ),
    "unsafe_index_put": row(
        lambda x, y: aten._unsafe_index_put(x, [torch.tensor([1, 0])], y[:2]), X, Y
    ),
    "index_put_mask": row(lambda x, b: x.index_put((b,), torch.tensor(0.0).double()), X, B),
    "index_put_masked": row(lambda x, b: x.index_put((b,), (x * 2)[b]), X, B),
    "embedding_bag": row(
        lambda i, w: aten._embedding_bag_forward_only(w, i, torch.tensor([0, 1, 2, 3]))[0], PICK, M
    ),
    "embedding_bag2": row(
        lambda i, w: aten._embedding_bag(w, i, torch.tensor([0, 1]))[0], PICK, M, apart=False
    ),
    "embedding_bag_weights": row(
        lambda i, w: aten._embedding_bag(
            M, i, torch.tensor([0, 1, 2, 3]), per_sample_weights=w, mode=0
        )[0],
        PICK,
        M[0],
    ),
    # packed sequences, from long to short
    "pack": row(lambda x: torch._pack_padded_sequence(x, torch.tensor([4, 3, 3, 1]), True)[0], X),
    "pack_time_first": row(
        lambda x: torch._pack_padded_sequence(x.transpose(0, 1), torch.tensor([4, 2, 1, 1]), False)[
            0
        ],
        X,
    ),
    # ragged chains
    "ragged_layers": row(
        lambda x, b: torch.zeros_like(x).index_put((b,), F.layer_norm(x[b] @ M, (4,))), X, B
    ),
    "ragged_experts": row(
        lambda x, i: torch.zeros_like(x).index_add(
            0, (i == 1).nonzero()[:, 0], x[(i == 1).nonzero()[:, 0]] * 2
        ),
        M,
        PICK,
    ),
    "ragged_position": row(
        lambda x, b: x[b] * torch.arange(1, int(b.sum()) + 1)[:, None], M, B, apart=False
    ),
    "ragged_cut": row(lambda x, b: x[b][:3], M, B, apart=False),
    "ragged_sum": row(lambda x, b: x[b].sum(0), M, B, apart=False),
    "ragged_softmax": row(lambda x, b: x[b].softmax(-1).sum(-1), M, B),
    "ragged_one": row(
        lambda x, i: torch.zeros_like(x).index_add(
            0,
            i.nonzero()[:, 0],
            x[i.nonzero()[:, 0]] * torch.arange(1, 1 + len(i.nonzero()))[:, None],
        ),
        M,
        torch.tensor([False, True, False, False]),
        apart=False,
    ),
    "ragged_one_put": row(
        lambda x, b: x.index_put((b,), torch.arange(1.0, 1 + int(b.sum()), dtype=x.dtype)[:, None]),
        M,
        torch.tensor([False, False, True, False]),
    ),
    "ragged_one_added": row(
        lambda x, i: (
            torch.zeros_like(x).index_add(
                0, i.nonzero()[:, 0], torch.ones(len(i.nonzero()), 4, dtype=x.dtype).cumsum(0)
            )
            + x
        ),
        M,
        torch.tensor([False, True, False, False]),
    ),
    "ragged_one_biased": row(
        lambda x, b: torch.zeros_like(x).index_put((b,), x[b] @ M + M[:1]),
        M,
        torch.tensor([False, False, True, False]),
        apart=False,
    ),
    "ragged_one_moved": row(
        lambda x, b: torch.zeros_like(x).index_put((b,), x[b][:, :1].t().sum(1, keepdim=True)),
        M,
        torch.tensor([False, False, True, False]),
        apart=False,
    ),
    "ragged_gather": row(
        lambda x, b: torch.zeros_like(x).index_add(
            0,
            b.nonzero().view(-1),
            x.gather(0, b.nonzero().expand(-1, 4)).softmax(-1),
        ),
        M,
        B,
    ),
    "ragged_nll": row(
        lambda x, i: F.cross_entropy(x[i != 0], i[i != 0], reduction="none"), M, PICK
    ),
    # losses
    "nll": row(lambda x, i: F.cross_entropy(x, i, reduction="none"), M, PICK),
    "nll_mean": row(lambda x, i: F.cross_entropy(x, i), M, PICK, apart=False),
    "nll_weighted": row(
        lambda x, i, w: F.cross_entropy(x, i, w.abs(), reduction="none"), M, PICK, real(4)
    ),
    "nll2d": row(lambda x, i: F.cross_entropy(x, i, reduction="none"), IMAGES, indices(4, 4, 4)),
    "elements": row(
        lambda x, y: [
            F.mse_loss(x, y, reduction="none"),
            F.smooth_l1_loss(x, y, reduction="none"),
            F.huber_loss(x, y, reduction="none"),
            F.l1_loss(x, y, reduction="none"),
            F.soft_margin_loss(x, y.sign(), reduction="none"),
            F.kl_div(x, y, reduction="none"),
            F.binary_cross_entropy_with_logits(x, y.sigmoid(), reduction="none"),
            F.binary_cross_entropy(x.sigmoid(), y.sigmoid(), reduction="none"),
        ],
        X,
        Y,
    ),
    "elements_mean": row(
        lambda x, y: [F.mse_loss(x, y), F.mse_loss(x, y, reduction="sum")], X, Y, apart=False
    ),
    "elements_backward": row(
        inner(
            lambda x, y: (
                F.mse_loss(x, y, reduction="none")
                * F.smooth_l1_loss(x, y)
                * F.huber_loss(x, y, reduction="none")
            ),
            0,
            1,
        ),
        X,
        Y,
        apart=False,
    ),
    "soft_margin_backward": row(
        inner(lambda x: F.soft_margin_loss(x, torch.ones_like(x), reduction="none")), X
    ),
    "margins": row(
        lambda x, i: [
            F.multi_margin_loss(x, i, reduction="none"),
            F.multilabel_margin_loss(x, i[:, None].expand(4, 4), reduction="none"),
        ],
        M,
        PICK,
    ),
    "ctc": row(
        lambda x, i: F.ctc_loss(
            x.log_softmax(2), i + 1, torch.full((4,), 5), torch.full((4,), 2), reduction="none"
        ),
        real(5, 4, 6),
        indices(4, 2),
        apart=False,
    ),
    # backward kernels
    "nll_backward": row(inner(lambda x: F.cross_entropy(x, PICK, reduction="none")), M),
    "nll_mean_backward": row(
        inner(lambda x: F.cross_entropy(x, PICK, M[0].abs()).exp()), M, apart=False
    ),
    "layer_norm_backward": row(inner(lambda x: F.layer_norm(x, (4,), M[0], M[1]).exp()), X),
    "layer_norm_weights": row(
        inner(lambda w, x: F.layer_norm(x, (4,), w).exp()), real(4), X, apart=False
    ),
    "group_norm_backward": row(inner(lambda x: F.group_norm(x, 2, M[0], M[1]).exp()), X),
    "batch_norm_backward": row(inner(lambda x: F.batch_norm(x, M[0], M[1].abs(), M[2]).exp()), X),
    "conv_backward": row(inner(lambda x, w: F.conv1d(x, w).exp(), 0), X, real(4, 4, 3)),
    "conv_backward_all": row(
        inner(lambda x, w, b: F.conv1d(x, w, b).exp(), 0, 1, 2), X, real(4, 4, 3), real(4)
    ),
    "attention_backward": row(
        inner(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), 0, 1, 2),
        IMAGES,
        IMAGES + 1,
        IMAGES * 2,
    ),
    "placed": row(
        lambda x: [
            aten.slice_backward(x, [4, 8, 4], 1, 0, 8, 2),
            aten.select_backward(x, [4, 3, 4, 4], 1, 2),
            aten.diagonal_backward(x, [4, 4, 4, 4], 0, 1, 2),
        ],
        X,
    ),
    "embedding_backward": row(
        lambda g, i: aten.embedding_dense_backward(g, i, 4, -1, False), M, PICK, apart=False
    ),
    "unfold_backward": row(lambda g: aten.unfold_backward(g, [4, 5, 4], 1, 2, 1), IMAGES),
}


@torch.inference_mode()
def inference(x, w):
    """Composite ops reach a dispatch mode whole here; the trace takes them apart."""
    y = F.linear(x, w).softmax(-1).reshape(4, 16).reshape(4, 4, 4)
    return F.dropout(F.layer_norm(y, (4,)), 0.0) + torch.einsum("abc,cd->abd", x, w)


def spd(x):
    return x @ x.mT + 4 * torch.eye(4, dtype=x.dtype)


def one(value):
    return torch.full((4,), float(value), dtype=torch.float64)


def running(x, y):
    m, v = one(0), one(1)
    F.batch_norm(y, m, v, training=True)
    return F.batch_norm(x, m, v) + m.sum()


def lstm(x, batch_first):
    torch.manual_seed(1)
    layer = torch.nn.LSTM(4, 4, batch_first=batch_first)
    out, (h, c) = layer(x)
    return out, h, c


def cells(x, h):
    torch.manual_seed(1)
    out = torch.nn.LSTMCell(4, 4, dtype=x.dtype)(x, (h, h * 2))
    return [*out, torch.nn.GRUCell(4, 4, dtype=x.dtype)(x, h)]
