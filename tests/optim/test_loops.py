"""The training loops that people run, with the real packages."""

import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvopt

OPTIMIZERS = {
    "diag_ggn": curvopt.DiagGGNOptimizer,
    "variance_adaptive": curvopt.VarianceAdaptiveSGD,
    # With little damping the factor itself amplifies rounding.
    "polar": lambda p: curvopt.PolarOptimizer(p, eps=0.3),
}
every = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def data(n=64):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=draw)
    return TensorDataset(x, x[:, :3].argmax(1))


def loader(parts=1):
    return DataLoader(data(), batch_size=16 // parts)


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


def fit(package, module, epochs=3, parts=1, **options):
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
    trainer.fit(module, loader(parts))
    return trainer


@every
def test_lightning_automatic_optimization(lightning, make):
    """It hands `step` a closure: nothing needs to change."""
    task = module(lightning, make)
    fit(lightning, task)
    assert_same(task.model, plain(make, 3))


@pytest.mark.parametrize("recorded", [False, True], ids=["as-it-is", "recorded"])
@every
def test_lightning_manual_optimization(lightning, make, recorded):
    def training_step(self, batch):
        opt = self.optimizers()
        opt.zero_grad()
        with opt.record() if recorded else nullcontext():
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


@every
def test_lightning_accumulates(lightning, make):
    """The first closures run outside of `step`, the last one inside."""
    task = module(lightning, make)
    fit(lightning, task, parts=2, accumulate_grad_batches=2)
    assert_same(task.model, plain(make, 3))


@every
def test_lightning_in_bfloat16_with_clipping(lightning, make):
    task = module(lightning, make)
    fit(lightning, task, precision="bf16-mixed", gradient_clip_val=1e3)
    for p, q in zip(task.model.parameters(), plain(make, 3), strict=True):
        assert 0 < (p - q).norm() < 0.1 * q.norm()


@every
def test_lightning_detects_anomalies(lightning, make):
    task = module(lightning, make)
    fit(lightning, task, detect_anomaly=True)
    assert_same(task.model, plain(make, 3))


@pytest.mark.parametrize("automatic", [True, False])
@every
def test_lightning_skips_a_training_step_that_returns_none(lightning, make, automatic):
    """As with torch's optimizers: no gradient, no step."""
    seen = []

    def training_step(self, batch):
        seen.append(len(seen))
        loss = self.loss(batch)
        skipped = len(seen) % 3 == 1
        if automatic:
            return None if skipped else loss
        if not skipped:
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
        return None

    def seeded(params):
        opt = make(params)
        opt.generator = torch.Generator().manual_seed(0)
        return opt

    task = module(lightning, seeded, training_step, automatic_optimization=automatic)
    trainer = fit(lightning, task)
    assert trainer.optimizers[0].steps == 8

    model = network()
    opt = seeded(model.parameters())
    for k, (x, y) in enumerate([*loader()] * 3):
        if k % 3:
            opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
    assert_same(task.model, list(model.parameters()))


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


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("by_hand", [False, True], ids=["accumulate", "by-hand"])
@every
def test_accelerate_as_it_is(accelerate, make, by_hand, parts):
    """The loop of its documentation, clipping included."""
    steps = 1 if by_hand else parts
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model = network()
    batches = loader(parts)
    model, opt, batches = accelerator.prepare(model, make(model.parameters()), batches)
    torch.manual_seed(1)
    for _ in range(3):
        for k, (x, y) in enumerate(batches, 1):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss / parts if by_hand else loss)
                if by_hand and k % parts:
                    continue
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1e6)
                opt.step()
                opt.zero_grad()
    assert_same(model, plain(make, 3))


@every
def test_accelerate_accumulation_with_closures_is_refused(accelerate, make):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    model, opt, batches = accelerator.prepare(model, make(model.parameters()), loader(2))
    before = [p.detach().clone() for p in model.parameters()]
    (x, y), *_ = batches
    accelerator.gradient_state._set_sync_gradients(True)  # the second batch of two
    with pytest.raises(curvopt.CurvoptError, match="leaves out the closures"):
        opt.step(lambda: F.cross_entropy(model(x), y))
    assert_same(model, before)


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


def trainer_of(transformers, folder, model, opt, accumulate=1, **options):
    rows = [{"input_ids": ids, "labels": ids} for ids in sentences()]
    loss = options.pop("compute_loss_func", None)
    settings = transformers.TrainingArguments(
        **{
            "output_dir": folder,
            "num_train_epochs": 4,
            "per_device_train_batch_size": 8 // accumulate,
            "gradient_accumulation_steps": accumulate,
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1e6,
        }
        | options
    )
    return transformers.Trainer(
        model=model,
        args=settings,
        train_dataset=rows,
        optimizers=(opt, None),
        compute_loss_func=loss,
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore")
@every
def test_trainer_as_it_is(transformers, tmp_path, accumulate, make):
    """Its steps are those of closures on the same batches."""
    model, twin = gpt2(transformers), gpt2(transformers)
    opt, other = (make(m.named_parameters()) for m in (model, twin))
    trainer = trainer_of(transformers, tmp_path, model, opt, accumulate)
    batches, counts, compute = [], [], trainer.compute_loss

    def seen(model, inputs, *args, **kwargs):
        if model.training:
            batches.append(inputs["input_ids"])
            counts.append(kwargs.get("num_items_in_batch"))
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = seen
    generator = make is not curvopt.VarianceAdaptiveSGD
    if generator:
        opt.generator, other.generator = (torch.Generator().manual_seed(0) for _ in range(2))
    trainer.train()
    assert opt.steps == len(batches) // accumulate == 16
    if accumulate > 1 and generator:
        return  # the signs are drawn for each part
    for k in range(0, len(batches), accumulate):
        ids, items = torch.cat(batches[k : k + accumulate]), {"num_items_in_batch": counts[k]}
        other.step(lambda ids=ids, items=items: twin(input_ids=ids, labels=ids, **items).loss)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore")
@every
def test_trainer_smooths_labels(transformers, tmp_path, accumulate, make):
    """By its own loss where no curvature is wanted, by torch's elsewhere."""

    def smoothed(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.1)

    model = gpt2(transformers)
    opt = make(model.named_parameters())
    own = make is curvopt.VarianceAdaptiveSGD
    options = {"label_smoothing_factor": 0.1} if own else {"compute_loss_func": smoothed}
    trainer = trainer_of(transformers, tmp_path, model, opt, accumulate, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.95 * losses[0]
    if not own:
        opt = make(model.named_parameters())
        trainer = trainer_of(transformers, tmp_path, model, opt, label_smoothing_factor=0.1)
        with pytest.raises(curvopt.CurvoptError, match="Hessian"):
            trainer.train()


@pytest.mark.filterwarnings("ignore")
@every
def test_trainer_resumes(transformers, tmp_path, make):
    def run(folder, epochs, resume=False):
        model = gpt2(transformers)
        options = {"num_train_epochs": epochs, "save_strategy": "epoch", "seed": 1}
        trainer = trainer_of(transformers, folder, model, make(model.named_parameters()), **options)
        torch.manual_seed(1)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "half", 2)
    resumed = run(tmp_path / "half", 4, resume=True)
    for p, q in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_trace_holds_the_forward_pass_alone():
    """What an optimizer computes after it costs no note of each op."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1])
    for kind in (curvopt.DiagGGNOptimizer, curvopt.VarianceAdaptiveSGD, curvopt.PolarOptimizer):
        opt = kind(net.parameters())
        opt.zero_grad()
        with opt.record() as tape:
            loss = nn.functional.cross_entropy(net(x), y)
            seen = len(tape.trace.ops)
            loss.backward()
        assert 0 < seen == len(tape.trace.ops)
