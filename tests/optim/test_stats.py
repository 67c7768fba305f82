"""`stats`: what is logged is what happened, for every optimizer."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from curvopt.recording.tape import Tape
from tests.optim.test_contract import PRIVATE, ROWS, build, every, network, options_of, same, train

F64 = torch.float64


def mean_over_elements(model, values):
    total = sum(p.numel() for p in model.parameters())
    return sum(p.numel() * v for p, v in zip(model.parameters(), values, strict=True)) / total


@every
def test_flat_dict_of_finite_floats(row):
    model, opt = build(row)
    assert opt.stats() == {"steps": 0.0, "lr": opt.param_groups[0]["lr"]}
    seen = []
    for t in range(12):
        train(model, opt, 1, start=t)
        stats = opt.stats()
        assert stats["steps"] == t + 1
        assert all(type(value) is float and math.isfinite(value) for value in stats.values())
        seen.append(stats.keys())
    assert all(keys == seen[0] for keys in seen)  # loggers like the same curves at every step
    assert len(seen[0]) > 6
    overall = opt.stats(per_tensor=False)
    assert overall.keys() == {key for key in seen[0] if not key.endswith(("weight", "bias"))}
    assert all(overall[key] == stats[key] for key in overall)


@every
def test_asking_changes_nothing(row):
    (asked, opt), (other, plain) = build(row), build(row)
    for t in range(6):
        for net, optimizer in ((asked, opt), (other, plain)):
            torch.manual_seed(t)
            train(net, optimizer, 1, start=t)
        before, drawn = copy.deepcopy(opt.state_dict()), torch.get_rng_state()
        opt.stats()
        assert same(opt.state_dict(), before)
        assert torch.equal(torch.get_rng_state(), drawn)
    assert all(map(torch.equal, asked.parameters(), other.parameters()))


@every
def test_state_is_enough(row):
    """A resumed run logs what it would have logged, where it does not tell of the last batch."""
    model, opt = build(row)
    train(model, opt, 3)
    again = build(row)[1]
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    if row not in PRIVATE:
        assert again.stats() == opt.stats()


@every
def test_several_groups(row):
    model = network()
    groups = [{"params": [p], "lr": 0.01 * k} for k, p in enumerate(model.parameters(), 1)]
    opt = ROWS[row](groups)
    train(model, opt, 1)
    stats = opt.stats()
    assert [stats[f"lr/{k}"] for k in range(4)] == pytest.approx([0.01, 0.02, 0.03, 0.04])
    if row not in PRIVATE:
        assert "step_rms/parameter_3" in stats


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("row", ["diag_ggn", "diag_ggn-exact", "variance_adaptive-every-step"])
def test_step_rms_is_that_of_the_step(row, weight_decay):
    model, opt = build(row, F64, weight_decay=weight_decay)
    for t in range(6):
        before = [p.detach().clone() for p in model.parameters()]
        train(model, opt, 1, start=t)
        shrink = 1 - opt.param_groups[0]["lr"] * weight_decay
        moved = [p.detach() - shrink * q for p, q in zip(model.parameters(), before, strict=True)]
        stats = opt.stats()
        for (name, _), step in zip(model.named_parameters(), moved, strict=True):
            assert stats[f"step_rms/{name}"] == pytest.approx(step.square().mean().sqrt().item())
        everything = torch.cat([step.flatten() for step in moved])
        assert stats["step_rms"] == pytest.approx(everything.square().mean().sqrt().item())


def test_rate_and_signal_are_what_leads_the_rate():
    model, opt = build("diag_ggn", F64, lr=0.01, adaptation=0.2)
    for t in range(15):
        before = opt.stats()
        train(model, opt, 1, start=t)
        after = opt.stats()
        for name, _ in model.named_parameters():
            rate = before.get(f"rate/{name}", 0.01)
            grown = rate * math.exp(0.2 * after[f"signal/{name}"])
            assert after[f"rate/{name}"] == pytest.approx(grown, rel=1e-9)
    rates = [after[f"rate/{name}"] for name, _ in model.named_parameters()]
    assert after["rate"] == pytest.approx(mean_over_elements(model, rates))
    assert len(set(rates)) == 4


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_signal_is_one_where_gradients_agree_and_zero_for_noise(noise):
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(4000, 1, dtype=F64))
    opt = curvopt.DiagGGNOptimizer([p], lr=1e-9)
    x = torch.ones(2, 1, dtype=F64)
    for _ in range(40):  # p stays near 0, so that the gradient is that of the targets
        y = noise * torch.randn(2, 4000).double() + (1 - noise)
        opt.step(lambda y=y: F.mse_loss(F.linear(x, p), y))
    assert opt.stats()["signal"] == pytest.approx(1 - noise, abs=0.05)


def test_no_signal_without_momentum():
    model, opt = build("diag_ggn", momentum=0.0)
    train(model, opt, 2)
    assert "signal" not in opt.stats()
    assert opt.stats()["rate"] == pytest.approx(1e-3)


def test_curvature_is_the_mean_of_the_diagonal():
    model, opt = build("diag_ggn-exact", F64, curvature_every=1, curvature_decay=0.0)
    x, y = torch.randn(8, 4).double(), torch.arange(8) % 3
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    result = curvopt.compute(closure, model.named_parameters(), curvopt.DiagGGNExact())
    opt.step(closure)
    stats = opt.stats()
    means = [h.mean().item() for h in result.diag_ggn_exact.values()]
    for name, mean in zip(result.diag_ggn_exact.named(), means, strict=True):
        assert stats[f"curvature/{name}"] == pytest.approx(mean)
    assert stats["curvature"] == pytest.approx(mean_over_elements(model, means))


@pytest.mark.parametrize("debiased", [False, True])
def test_variance_and_gain(debiased):
    model, opt = build("variance_adaptive", F64, variance_every=1, debiased=debiased, momentum=0.0)
    x, y = torch.randn(8, 4).double(), torch.arange(8) % 3
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    result = curvopt.compute(closure, model.named_parameters(), curvopt.BatchGrad())
    opt.step(closure)
    stats, rows = opt.stats(), result.batch_grad
    for name, row in rows.named().items():
        spread, g = row.var(0), row.mean(0)
        factor = 1 - spread / 8 / g**2 if debiased else g**2 / (g**2 + spread / 8)
        left = (factor.clamp(min=0) * g).norm() / g.norm()
        assert stats[f"variance/{name}"] == pytest.approx(spread.mean().item())
        assert stats[f"gain/{name}"] == pytest.approx(left.item())


def test_noise_is_logged_without_what_is_not_measured():
    model, opt = build("variance_adaptive")
    train(model, opt, 1)
    assert opt.stats()["noise/scale"] == opt.noise.scale
    assert opt.stats()["noise/batch_size"] == 8
    assert "noise/inner_product_test" not in opt.stats()
    model, opt = build("variance_adaptive", noise_tests=True)
    train(model, opt, 1)
    assert opt.stats()["noise/inner_product_test"] == opt.noise.inner_product_test


def test_private_numbers():
    pytest.importorskip("dp_accounting")
    model = network()
    opt = curvopt.DPSGD(
        model.parameters(), 0.1, noise_multiplier=1.0, max_grad_norm=0.5, expected_batch_size=16,
        sampler="poisson", sample_rate=0.01,
    )  # fmt: skip
    train(model, opt, 1)
    stats = opt.stats(delta=1e-5)
    assert stats["epsilon"] == opt.privacy_spent(1e-5) > 0
    assert "epsilon" not in opt.stats()
    assert stats["noise_std"] == 1.0 * 0.5 / 16
    assert stats["not_private/clip_fraction"] == opt.clip_fraction > 0
    assert stats["not_private/median_norm"] == opt.norms.sort().values[3].item()
    assert stats["not_private/batch_size"] == 8
    opt.empty_step()
    assert opt.stats()["not_private/batch_size"] == 0


@every
def test_repr_tells_all_settings(row):
    _, opt = build(row, batch_size=8)
    text = repr(opt)
    for name in options_of(row) - {"self", "params", "defaults", "privacy"}:
        assert f"    {name}: " in text
    assert "batch_size: 8" in text
    assert "reduction: None" in text


def test_repr_tells_what_private_optimizers_keep_elsewhere():
    opt = curvopt.DPSGD(
        network().parameters(), 0.1, noise_multiplier=1.5, max_grad_norm=0.5,
        expected_batch_size=16, num_samples=160, secure_noise=True,
    )  # fmt: skip
    lines = [line.strip() for line in repr(opt).splitlines()]
    expected = ["noise_multiplier: 1.5", "secure_noise: True", "num_samples: 160"]
    assert [line for line in lines if line in expected] == sorted(expected)


def test_lightning_logs_them(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.seen = network(), []

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return curvopt.DiagGGNOptimizer(self.named_parameters())

        def on_train_batch_end(self, *args):
            self.log_dict(self.optimizers().stats())
            self.seen.append(self.optimizers().stats()["steps"])

    data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.arange(8) % 3)
    model = Model()
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
    assert model.seen == [1.0, 2.0]
    assert trainer.logged_metrics["step_rms/net.0.weight"] > 0


def test_reading_waits_for_the_device_once(monkeypatch):
    reads = []
    for name in ("tolist", "item", "__float__"):
        plain = getattr(torch.Tensor, name)
        counted = lambda x, plain=plain, name=name: (reads.append(name), plain(x))[1]  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, counted)
    model, opt = build("diag_ggn")
    with Tape(list(model.named_parameters())):
        pass
    train(model, opt, 1)
    reads.clear()
    opt.stats()
    assert reads == ["tolist"]
