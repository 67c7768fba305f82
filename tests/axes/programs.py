"""Random programs on a [4, 4, 4] tensor: all sizes are the same, no axis is told by its length."""

import warnings
from types import SimpleNamespace

import torch
import torch.nn.functional as F

SIZE = 4


class Centre(torch.autograd.Function):
    """A custom function that mixes along a dim, or not."""

    @staticmethod
    def forward(ctx, h, d):
        return h * 2 if d == 7 else h - h.mean(d, keepdim=True)

    @staticmethod
    def backward(ctx, g):
        return g, None


def scripted(function):
    """TorchScript, which new releases of torch warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(function)


@scripted
def scripted_mean(h, d: int):
    return h - h.mean(d, keepdim=True)


@scripted
def scripted_sum(h):
    return torch.tanh(h) * h.sum(-1, keepdim=True)


STEPS = {}


def step(function):
    """Register a kind of step, by its name."""
    STEPS[function.__name__] = function
    return function


def small(s):
    """Indices from 0 to 3 that depend on the data."""
    return (s.k.detach().abs() * 3).long().clamp(max=3)


def signs(s):
    return s.h.detach()[..., 0] > 0


@step
def perm(s):
    return s.h.transpose(s.d, s.e)


@step
def view(s):
    h = s.h
    return h.reshape(-1, h.shape[-1]) if s.c < 0.5 else h.reshape(h.shape[0], -1)


@step
def unview(s):
    return s.h.reshape(4, 4, -1)


@step
def mm(s):
    return s.h @ s.W


@step
def bmm(s):
    return s.h @ s.h.transpose(-1, -2)


@step
def softmax(s):
    return s.h.softmax(s.d)


@step
def mean(s):
    return s.h - s.h.mean(s.d, keepdim=True)


@step
def add(s):
    return s.h + s.k


@step
def sub(s):
    return s.h - 0.5 * s.k


@step
def mul(s):
    return s.h * s.k


@step
def cat(s):
    z = torch.cat([s.h, s.h * 2], s.d)
    return z.narrow(s.d, s.h.shape[s.d] if s.b < 0.5 else 2, s.h.shape[s.d])


@step
def roll(s):
    return s.h.roll(1 if s.b < 0.6 else 0, s.d)


@step
def flip(s):
    return s.h.flip(s.d)


@step
def index(s):
    return s.h.index_select(s.d, s.perm)


@step
def iota(s):
    return s.h[torch.arange(s.h.shape[0])]


@step
def select(s):
    to = s.d if s.b < 0.7 else (s.d + 1) % s.h.ndim
    return torch.stack([s.h.select(s.d, i) for i in range(s.h.shape[s.d])], to)


@step
def cumsum(s):
    return s.h.cumsum(s.d)


@step
def norm(s):
    return F.layer_norm(s.h, s.h.shape[-1:])


@step
def self_sum(s):
    return s.h + s.h.transpose(s.d, s.e)


@step
def gather_sorted(s):
    return s.h.gather(s.d, s.h.argsort(s.d))


@step
def weight_left(s):
    return (s.W @ s.h.transpose(-1, -2)).transpose(-1, -2)


@step
def copy(s):
    r = torch.zeros_like(s.h)
    r.copy_(s.h)
    if s.b < 0.5:
        r.select(s.d, 0).add_(s.h.select(s.d, 1))
    else:
        r.mul_(2)
    return r


@step
def detached_std(s):
    return s.h / (1 + s.h.detach().std(s.d, keepdim=True))


@step
def sort(s):
    return s.h.sort(s.d).values


@step
def mask_const(s):
    return s.h.masked_fill(torch.ones(4, 4).tril() == 0, 0.0)


@step
def chunks(s):
    z = s.h.chunk(2, s.d)
    return torch.cat([z[0] * 2, z[1]] if s.b < 0.6 else [z[1], z[0]], s.d)


@step
def repeat(s):
    h, d = s.h, s.d
    if s.b < 0.5:
        z = h.repeat_interleave(2, d)
        return z.reshape(*h.shape[:d], h.shape[d], 2, *h.shape[d + 1 :]).sum(d + 1)
    z = torch.cat([h, h], d)
    return z.reshape(*h.shape[:d], 2, h.shape[d], *h.shape[d + 1 :]).sum(d)


@step
def attention(s):
    k = s.k.unsqueeze(0)
    if s.c < 0.3:
        mask = s.h.detach() > 0 if s.b < 0.5 else torch.ones(4, 4, dtype=torch.bool).tril()
        mask = mask | torch.eye(4, dtype=torch.bool)
        return F.scaled_dot_product_attention(s.h.unsqueeze(0), k, k, attn_mask=mask)[0]
    return F.scaled_dot_product_attention(s.h.unsqueeze(0), k, k).squeeze(0)


@step
def slices(s):
    n = s.h.shape[s.d] - 1
    parts = [s.h.narrow(s.d, 1, n), s.h.narrow(s.d, 0, 1)]
    if s.b >= 0.5:
        parts = [s.h.narrow(s.d, 0, 1), s.h.narrow(s.d, 1, n)]
    return torch.cat(parts, s.d)


@step
def pad(s):
    if s.b < 0.5:
        return F.pad(s.h, (1, 0))[..., :-1]
    return F.pad(s.h, (0, 1))[..., :-1]


@step
def outer(s):
    return torch.einsum("...i,...j->...ij", s.h, s.k)[..., 0]


@step
def inplace(s):
    r = s.h.clone()
    v = r.transpose(s.d, s.e)
    if s.c < 0.5:
        v.add_(s.k)
    else:
        v.select(0, 1).mul_(v.select(0, 0) if s.b < 0.3 else 2.0)
    return r


@step
def onehot(s):
    return s.h + F.one_hot(small(s).select(-1, 0), 4).to(s.h.dtype)


@step
def scatter(s):
    if s.b < 0.5:
        return torch.zeros_like(s.h).scatter_add(s.d, small(s), s.h)
    return torch.zeros_like(s.h).scatter(s.d, small(s), s.h)


@step
def index_add(s):
    return s.h.index_add(s.d, s.perm if s.c < 0.7 else torch.tensor([0, 0, 1, 1]), s.k)


@step
def masked(s):
    m = signs(s)
    r = torch.zeros_like(s.h)
    r[m] = (s.h[m] * 2).tanh()
    return r


@step
def where(s):
    return torch.where(s.k > 0, s.h, s.h.flip(s.d))


@step
def loop(s):
    r, n = torch.zeros_like(s.h), s.h.shape[s.d]
    for i in range(n):
        j = i if s.b < 0.7 else (i + 1) % n
        r.select(s.d, i).copy_(s.h.select(s.d, j) * 2)
    return r


@step
def strided(s):
    z = s.h.contiguous()
    return z.as_strided(z.shape, z.stride() if s.b < 0.5 else z.stride()[::-1], 0)


@step
def put(s):
    i = torch.arange(4)
    j = s.perm if s.b < 0.5 else i
    return s.h.index_put((i, j), s.h[i, i], accumulate=s.c < 0.5)


@step
def conv(s):
    if s.c < 0.5:
        return F.conv1d(s.h, s.W[:, :, None], padding=0)
    groups = 4 if s.b < 0.5 else 2
    return F.conv1d(s.h, s.W[:, : 4 // groups, None].expand(-1, -1, 3), padding=1, groups=groups)


@step
def ragged(s):
    i = signs(s).reshape(-1).nonzero().squeeze(1)
    f = s.h.reshape(-1, s.h.shape[-1])
    g = (f[i] @ s.W).tanh() if s.b < 0.7 else f[i] * torch.arange(1.0, len(i) + 1)[:, None]
    return torch.zeros_like(f).index_add(0, i, g).reshape(s.h.shape)


@step
def expand(s):
    if s.b < 0.3:
        return s.h.select(s.d, 0).unsqueeze(s.d).expand(s.h.shape)
    return s.h.mean(s.d, keepdim=True).expand(s.h.shape)


@step
def stacked(s):
    z = torch.stack([s.h, s.k], s.e)
    if s.c < 0.5:
        return z.sum(s.e)
    if s.c < 0.75:
        return z.flatten(0, 1)[: s.h.shape[0]]
    return z.transpose(0, 1).flatten(0, 1)[1 : 1 + s.h.shape[0]]


@step
def einsum(s):
    form = "abc,abd->acd" if s.b < 0.3 else "abc,dbc->adb" if s.b < 0.6 else "abc,acd->abd"
    return torch.einsum(form, s.h, s.k)


@step
def reshaped(s):
    if s.b < 0.5:
        return s.h.permute(2, 0, 1).reshape(4, 4, 4)
    return s.h.reshape(2, 2, 4, 4).transpose(0, 1).reshape(4, 4, 4)


@step
def by_argsort(s):
    flat = s.h.detach().flatten(1)
    i = flat.sum(1).argsort() if s.b < 0.3 else flat.argmax(1) % 4
    return s.h[i] if s.c < 0.5 else s.h[torch.arange(4), i][:, None] + s.h


@step
def unfold(s):
    r = s.h.unfold(s.d, 2, 1).sum(-1)
    return torch.cat([r, s.h.narrow(s.d, 0, 1)], s.d)


@step
def diagonal(s):
    if s.b < 0.5:
        return s.h * torch.eye(4).reshape(4, 4, *[1] * (s.h.ndim - 2))
    return torch.diagonal(s.h, 0, 0, 1)


@step
def gbmm(s):
    return torch.bmm(s.h, s.k)


@step
def views(s):
    r = s.h.clone()
    if s.b < 0.4:
        r.narrow(s.d, 0, 2).copy_(r.narrow(s.d, 2, 2))
    elif s.b < 0.7:
        r.unbind(s.d)[1].add_(s.k.select(s.d, 1))
    else:
        r.view(-1)[:16].mul_(3)
    return r


@step
def capped(s):
    i = signs(s).reshape(-1).nonzero().squeeze(1)[:5]
    f = s.h.reshape(-1, s.h.shape[-1])
    return f.index_add(0, i, f[i].tanh() * 2).reshape(s.h.shape)


@step
def ranked(s):
    m = signs(s).long().cumsum(0 if s.b < 0.5 else -1)
    return s.h * (m < 3)[..., None]


@step
def duplicated(s):
    n = (s.h.detach().flatten(1)[:, 0] > 0).long() + 1
    return s.h.repeat_interleave(n, 0)[:4]


@step
def norms(s):
    if s.b < 0.4:
        return F.group_norm(s.h, 2)
    return F.instance_norm(s.h) if s.b < 0.7 else F.normalize(s.h, dim=s.d)


@step
def pools(s):
    if s.b < 0.4:
        return F.max_pool1d(s.h, 3, 1, 1)
    if s.b < 0.7:
        return F.avg_pool2d(s.h, 2, 1)[:, [0, 1, 2, 0]][..., [0, 1, 2, 2]]
    return F.adaptive_avg_pool1d(s.h, 4)


@step
def lstm(s):
    torch.manual_seed(1)
    q = torch.nn.LSTM(4, 4, batch_first=s.b < 0.5)
    return q(s.h)[0] if s.c < 0.5 else q(s.h)[1][0].expand(4, 4, 4) + s.h


@step
def lstm32(s):
    torch.manual_seed(1)
    q = torch.nn.LSTM(4, 4, batch_first=s.b < 0.5, dtype=torch.float32)
    h = s.h.float()
    return q(h)[0].double() if s.c < 0.7 else q(h)[1][0].expand(4, 4, 4).double()


@step
def embedding(s):
    i = small(s)[..., 0]
    return F.embedding(i, s.W) + s.h if s.b < 0.5 else F.embedding(i, s.h[0])


@step
def cdist(s):
    return torch.cdist(s.h, s.k)


@step
def batch_norm(s):
    if s.b < 0.4:
        return F.batch_norm(s.h, None, None, training=True)
    return F.batch_norm(s.h, torch.zeros(4), torch.ones(4))


@step
def running(s):
    """Statistics that one call leaves and another uses."""
    m, v = torch.zeros(4), torch.ones(4)
    F.batch_norm(s.k.detach(), m, v, training=s.b < 0.5)
    return F.batch_norm(s.h, m, v)


@step
def inner(s):
    with torch.enable_grad():
        q = s.h.detach().clone().requires_grad_()
        if s.b < 0.4:
            z = ((q @ s.W).tanh() * s.k.detach()).square()
        elif s.b < 0.6:
            z = F.cross_entropy(q.flatten(1), s.y, reduction="none")
        elif s.b < 0.8:
            z = F.conv1d(F.layer_norm(q, (4,)), s.W[:, :, None]).square() * s.k.detach()
        else:
            z = F.group_norm(q[..., :3], 2).square().unfold(1, 2, 1)[..., 0].exp()
        total = z.sum() if s.c < 0.6 else z.mean().square()
        return torch.autograd.grad(total, q, create_graph=True)[0] + s.h


@step
def custom(s):
    return Centre.apply(s.h, s.d if s.c < 0.8 else 7)


@step
def logsumexp(s):
    if s.b < 0.5:
        return s.h - s.h.logsumexp(s.d, keepdim=True)
    return s.h / (1 + s.h.norm(dim=s.d, keepdim=True))


@step
def maxima(s):
    v, i = s.h.max(s.d, keepdim=True)
    if s.b < 0.4:
        return s.h - v
    return s.h.gather(s.d, i).expand(s.h.shape) if s.b < 0.7 else s.h * i


@step
def mask_put(s):
    r = s.h.clone()
    r[s.h.detach() > 0] = 0.0 if s.b < 0.5 else 1.0
    return r + s.k if s.c < 0.3 else r


@step
def owned_put(s):
    i = small(s).flatten(1)[:, 0]
    if s.b < 0.5:
        return s.h.index_put((i,), s.k, accumulate=s.c < 0.5)
    return s.h.index_put((torch.arange(4), i), s.k[:, 0], accumulate=s.c < 0.5)


@step
def conv_other(s):
    if s.b < 0.5:
        return F.conv_transpose1d(s.h, s.W[:, :, None])
    return F.conv1d(s.h.transpose(0, 1), s.W[:, :, None]).transpose(0, 1)


@step
def conv_data(s):
    r = F.conv1d(s.h, s.k) if s.b < 0.5 else F.conv1d(s.h, s.k[:, :1], groups=4)
    return r.expand(4, 4, 4)


@step
def interpolate(s):
    if s.b < 0.4:
        return F.interpolate(s.h, scale_factor=2.0)[..., ::2]
    if s.b < 0.7:
        return F.interpolate(s.h, size=4, mode="linear")
    return F.interpolate(s.h[None], size=(4, 3), mode="bilinear")[0][..., [0, 1, 2, 0]]


@step
def owned_gather(s):
    i = small(s)
    if s.b < 0.5:
        return s.h.gather(s.d, i)
    if s.c < 0.5:
        return s.h.scatter(s.d, i, 1.0)
    return torch.zeros_like(s.h).scatter_reduce(s.d, i, s.h, "amax")


@step
def script(s):
    return scripted_mean(s.h, s.d) if s.b < 0.6 else scripted_sum(s.h)


@step
def kept_rows(s):
    i = (s.h.detach().flatten(1).sum(1) > 0).nonzero()[:, 0]
    if s.b < 0.5:
        return torch.zeros_like(s.h).index_copy(0, i, s.h[i] * 2)
    return s.h.index_fill(0, i, 0.5)


@step
def argmax(s):
    i = s.h.detach().argmax(s.d)
    return s.h + i.unsqueeze(s.d) if s.b < 0.5 else s.h.flip(s.d) * i.unsqueeze(s.d)


@step
def unsqueezed(s):
    if s.c < 0.5:
        return s.h.unsqueeze(s.e)[..., 0].expand(4, 4, 4)
    return (s.h.unsqueeze(s.d) * s.k.unsqueeze(s.e)).sum(int(s.a * 4))


@step
def windows(s):
    z = torch.cat([s.h, s.k], s.d).unfold(s.d, 4, 4).movedim(-1, s.d)
    return z.select(s.d + 1 if s.c < 0.5 else s.d, 0)


@step
def logical(s):
    m = (s.h > 0) & (s.k > 0)
    return torch.where(m.any(s.d, keepdim=True), s.h, -s.h)


@step
def diag_embed(s):
    return torch.diag_embed(s.h[..., 0]) if s.b < 0.5 else s.h * torch.eye(4)


@step
def triangles(s):
    return s.h.tril(int(s.b * 3) - 1) if s.c < 0.6 else s.h * torch.ones(4, 4).triu()


@step
def accumulate(s):
    r = torch.zeros(4, 4, 4)
    for i in range(4):
        r.narrow(s.d, i, 1).add_(s.h.narrow(s.d, i if s.b < 0.6 else (i + 1) % 4, 1))
    return r


@step
def swap(s):
    r = s.h.clone()
    t = r.select(s.d, 0).clone()
    r.select(s.d, 0).copy_(r.select(s.d, 1))
    r.select(s.d, 1).copy_(t if s.b < 0.5 else r.select(s.d, 1) * 2)
    return r


@step
def buffer(s):
    z = torch.empty(4, 8, 4)
    z[:, :4] = s.h
    z[:, 4:] = s.k
    if s.c < 0.5:
        return z[:, 4 * (s.b < 0.5) :][:, :4]
    return z.view(8, 4, 4)[int(s.a * 4) :][:4]


@step
def cumulative(s):
    if s.b < 0.3:
        return s.h.cumprod(s.d)
    if s.b < 0.5:
        return s.h.cummax(s.d).values
    if s.b < 0.8:
        return s.h.diff(dim=s.d, append=s.h.narrow(s.d, 0, 1))
    return s.h.logcumsumexp(s.d)


@step
def topk(s):
    v, i = s.h.topk(2, s.d)
    return torch.cat([v, v], s.d) if s.b < 0.5 else s.h.scatter(s.d, i, 0.0)


@step
def embedding_bag(s):
    return F.embedding_bag(small(s)[..., 0], s.W)[:, None] + s.h


@step
def fourier(s):
    if s.b < 0.4:
        return torch.fft.fft(s.h, dim=s.d).abs()
    if s.b < 0.7:
        return torch.fft.irfft(torch.fft.rfft(s.h, dim=s.d) * 2, 4, dim=s.d)
    z = torch.fft.fft2(s.h, dim=(s.d, s.e)) * torch.complex(s.k, s.h)
    return torch.view_as_real(z).sum(-1) if s.c < 0.5 else z.real + z.imag.conj()


@step
def complex_parts(s):
    z = torch.view_as_complex(torch.stack([s.h, s.k], -1))
    if s.b < 0.5:
        z = (z @ s.W.to(z.dtype)).conj()
    return torch.view_as_real(z)[..., 0] if s.c < 0.5 else z.angle() * z.imag


@step
def fills(s):
    r = s.h.clone()
    if s.b < 0.3:
        r.select(s.d, 0).fill_(s.h.detach().sum() if s.c < 0.5 else s.h.detach().reshape(-1)[0])
        return r
    if s.b < 0.6:
        return r.zero_() + s.k
    torch.manual_seed(2)
    return torch.normal(s.h.detach(), 1.0) if s.c < 0.5 else r.normal_() + s.k


@step
def masked_select(s):
    m = signs(s)
    if s.b < 0.5:
        z = torch.zeros_like(s.h)
        return z.masked_scatter(m[..., None].expand(s.h.shape), s.h)
    r = s.h.clone()
    r[..., 0][m] = torch.masked_select(s.h[..., 1 if s.c < 0.7 else 0], m) * 2
    return r


@step
def take(s):
    i = small(s) + 4 * torch.arange(4)[:, None]
    return torch.take(s.h, i) if s.b < 0.5 else torch.take_along_dim(s.h, small(s), s.d)


@step
def renorm(s):
    return s.h.renorm(2, s.d, 0.5)


@step
def bilinear(s):
    return F.bilinear(s.h, s.k, torch.stack([s.W, s.W + 1, s.W * 2, s.W]))


@step
def sampled(s):
    grid = torch.stack([s.k.tanh(), s.h.tanh()], -1)
    return F.grid_sample(s.h[:, None], grid, align_corners=False)[:, 0]


@step
def images(s):
    if s.b < 0.4:
        z = F.unfold(s.h[:, None], 2, padding=1)
        return z[:, :, :16].reshape(4, 4, 16)[..., :4]
    if s.b < 0.7:
        return F.pixel_shuffle(s.h.reshape(4, 4, 2, 2), 2).reshape(4, 4, 4)
    return F.pad(s.h, (1, 1), mode="reflect")[..., 1:5]


@step
def matrices(s):
    z = s.h @ s.h.transpose(-1, -2) + 3 * torch.eye(4)
    if s.b < 0.4:
        return torch.linalg.cholesky(z)
    return torch.linalg.inv(z) if s.b < 0.7 else s.h * torch.linalg.det(z)[:, None, None]


@step
def cells(s):
    torch.manual_seed(1)
    cell = torch.nn.LSTMCell(4, 4) if s.b < 0.5 else torch.nn.GRUCell(4, 4)
    r = cell(s.h[:, 0])
    return s.h + (r[0] if isinstance(r, tuple) else r)[:, None]


@step
def ragged_chain(s):
    """Layers on rows that a mask picked, put back where they were."""
    m = signs(s)
    z = F.layer_norm((s.h[m] @ s.W).relu(), (4,)).log_softmax(-1 if s.c < 0.8 else 0)
    z = z * z.sum(-1, keepdim=True)
    r = s.k.clone()
    r[m] = z if s.b < 0.7 else z.flip(0)
    return r


@step
def ragged_sum(s):
    m = signs(s)
    return s.h + (s.h[m].sum(0) if s.b < 0.5 else s.h[m].sum(-1).amax())


@step
def ragged_count(s):
    m = signs(s)
    z = s.h[m]
    return s.h + z.mean() if s.b < 0.4 else s.h * m.sum(-1).max()


def program(rng):
    """Two to six random steps."""
    names = list(STEPS)
    length = rng.randint(2, 6)
    return [(rng.choice(names), rng.random(), rng.random(), rng.random()) for _ in range(length)]


def execute(steps, data, weight, y, order):
    """Run the steps on a pool of tensors; the last one, and which steps torch refused.

    The pool begins with the data: one or two tensors of [4, 4, 4].

    A refused step is left out. Whether it is refused can depend on the data (the maximum of the
    rows that a mask picked, if there are none): a branch that Python takes, which no record sees.
    """
    refused = []
    pool = [*data, torch.tanh(data[0] @ weight)]
    for name, a, b, c in steps:
        h, k = pool[int(a * len(pool))], pool[int(b * len(pool))]
        if h.ndim < 2:
            continue
        s = SimpleNamespace(h=h, k=k, a=a, b=b, c=c, W=weight, y=y, perm=order)
        s.d, s.e = int(c * h.ndim), int(b * h.ndim)
        try:
            r = STEPS[name](s)
        except (RuntimeError, IndexError, ValueError):
            refused.append(name)
            continue
        if r.numel() <= 600 and r.ndim:
            pool.append(torch.tanh(r))
    return pool[-1].reshape(SIZE, -1) * (1 + weight[0, 0]), refused
