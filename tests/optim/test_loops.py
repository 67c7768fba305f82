"""The training loops that people run, with the real packages."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvopt

OPTIMIZERS = {
    "diag_ggn": curvopt.DiagGGNOptimizer,
    "variance_adaptive": curvopt.VarianceAdaptiveSGD,
    "polar": curvopt.PolarOptimizer,
}
every = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def data(n=64):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=draw)
    return TensorDataset(x, x[:, :3].argmax(1))


def loader():
    return DataLoader(data(), batch_size=16)


def plain(make, epochs, **options):
    """The parameters that the plainest loop ends with."""
    model = network()
    opt = make(model.parameters(), **options)
    torch.manual_seed(1)
    for _ in range(epochs):
        for x, y in loader():
            opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
    return list(model.parameters())


def assert_same(model, expected):
    for p, q in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# PyTorch Lightning.


@pytest.fixture
def lightning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning.pytorch as package

        yield package


def module(package, make, training_step=None, **attributes):
    """A Lightning module around the network."""

    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network()

        def loss(self, batch):
            x, y = batch
            return F.cross_entropy(self.model(x), y)

        def training_step(self, batch, index):
            return self.loss(batch) if training_step is None else training_step(self, batch)

        def configure_optimizers(self):
            opt = make(self.parameters())
            return [opt], [torch.optim.lr_scheduler.StepLR(opt, 100)]

    result = Module()
    for name, value in attributes.items():
        setattr(result, name, value)
    return result


def fit(package, module, epochs=3, **options):
    trainer = package.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    torch.manual_seed(1)
    trainer.fit(module, loader())
    return trainer


@every
def test_lightning_automatic_optimization(lightning, make):
    """It hands `step` a closure: nothing needs to change."""
    task = module(lightning, make)
    fit(lightning, task)
    assert_same(task.model, plain(make, 3))


@every
def test_lightning_manual_optimization(lightning, make):
    def training_step(self, batch):
        opt = self.optimizers()
        opt.zero_grad()
        with opt.record():
            self.manual_backward(self.loss(batch))
        opt.step()

    task = module(lightning, make, training_step, automatic_optimization=False)
    fit(lightning, task)
    assert_same(task.model, plain(make, 3))


def test_lightning_clips_gradients(lightning):
    """Between the closure's backward pass and the step."""
    task = module(lightning, curvopt.VarianceAdaptiveSGD)
    fit(lightning, task, gradient_clip_val=1e-6)
    before = network()
    for p, q in zip(task.model.parameters(), before.parameters(), strict=True):
        assert 0 < (p - q).norm() < 1e-4


def test_lightning_accumulation_is_refused(lightning):
    """It runs the first closures outside of `step`, where nothing can be recorded."""
    task = module(lightning, curvopt.VarianceAdaptiveSGD)
    with pytest.raises(curvopt.CurvoptError, match="was not recorded"):
        fit(lightning, task, accumulate_grad_batches=2)


@every
def test_lightning_resumes(lightning, make, tmp_path):
    task = module(lightning, make)
    trainer = fit(lightning, task, epochs=2)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    drawn = torch.get_rng_state()
    whole = module(lightning, make)
    fit(lightning, whole, epochs=4)

    resumed = module(lightning, make)
    trainer = lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.set_rng_state(drawn)
    trainer.fit(resumed, loader(), ckpt_path=tmp_path / "run.ckpt")
    assert_same(resumed.model, list(whole.model.parameters()))


# Accelerate.


@pytest.fixture
def accelerate():
    package = pytest.importorskip("accelerate")
    yield package
    package.state.AcceleratorState._reset_state(True)
    package.state.GradientState._reset_state()


@every
def test_accelerate(accelerate, make):
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    model, opt, batches = accelerator.prepare(model, make(model.parameters()), loader())
    torch.manual_seed(1)
    for _ in range(3):
        for x, y in batches:

            def closure(x=x, y=y):
                opt.zero_grad()
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                return loss

            opt.step(closure)
    assert_same(model, plain(make, 3))


def test_accelerate_accumulation(accelerate):
    """Each micro-batch is recorded by the optimizer that was prepared."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    recorder = curvopt.VarianceAdaptiveSGD(model.parameters())
    model, opt, batches = accelerator.prepare(model, recorder, DataLoader(data(), batch_size=8))
    for _ in range(3):
        for x, y in batches:
            with accelerator.accumulate(model):
                with recorder.record():
                    accelerator.backward(F.cross_entropy(model(x), y))
                opt.step()
                opt.zero_grad()
    assert_same(model, plain(curvopt.VarianceAdaptiveSGD, 3))


# Hugging Face.


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def gpt2(transformers):
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout))


def sentences():
    """Counting upwards, from anywhere."""
    start = torch.randint(12, (32, 1), generator=torch.Generator().manual_seed(0))
    return start + torch.arange(8)


@every
def test_fine_tuning(transformers, make):
    model = gpt2(transformers)
    opt = make(model.named_parameters())
    losses = []
    for _ in range(6):
        for ids in sentences().split(8):
            losses.append(opt.step(lambda ids=ids: model(input_ids=ids, labels=ids).loss).item())
    assert losses[-1] < 0.95 * losses[0]


class Recorded:
    """A mixin for `transformers.Trainer`: its forward and backward pass, recorded."""

    def training_step(self, *args, **kwargs):
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it
        with optimizer.record():
            return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore")
def test_trainer(transformers, tmp_path, accumulate):
    class Trainer(Recorded, transformers.Trainer):
        pass

    model = gpt2(transformers)
    opt = curvopt.VarianceAdaptiveSGD(model.named_parameters())
    rows = [{"input_ids": ids, "labels": ids} for ids in sentences()]
    settings = transformers.TrainingArguments(
        output_dir=tmp_path,
        num_train_epochs=4,
        per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows, optimizers=(opt, None))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.95 * losses[0]
    assert opt.samples == 8
