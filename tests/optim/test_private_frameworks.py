"""Private steps under Lightning, Accelerate and Trainer: Poisson batches, in parts, empty ones."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import curvopt
from curvopt.privacy import EmptyBatchCollate, PoissonBatchSampler, PrivateTrainerMixin
from tests.optim.test_private_loops import (
    CLIP,
    PARTS,
    assert_same,
    data,
    expected,
    loader_of,
    network,
    poisson,
    private,
    refused,
)


@pytest.fixture
def lightning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning.pytorch as package

        yield package


def fit(package, loader, opt_of, training_step=None, epochs=2, **options):
    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network()
            self.automatic_optimization = training_step is None

        def training_step(self, batch, index):
            if training_step is not None:
                return training_step(self, batch, index)
            x, y = batch
            return F.cross_entropy(self.model(x), y) if len(x) else None

        def configure_optimizers(self):
            self.opt = opt_of(self.parameters())
            return self.opt

    module = Module()
    trainer = package.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module


def test_lightning_with_poisson_batches(lightning):
    """Its automatic optimization; some batches are empty, on which the model would be run."""
    loader = loader_of(poisson(1.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = fit(lightning, loader, lambda p: private(p, loader))
    assert module.opt.ledger.steps == 2 * len(loader)
    assert_same(module.model, expected(size=1.5))


@pytest.mark.parametrize("value", [1e-6, None])
def test_lightning_clips_the_private_gradient(lightning, value):
    loader = loader_of(poisson())
    module = fit(
        lightning, loader, lambda p: private(p, loader, noise_multiplier=5.0),
        gradient_clip_val=value,
    )  # fmt: skip
    moved = [(p - q).norm() for p, q in zip(
        module.model.parameters(), network().parameters(), strict=True)]  # fmt: skip
    steps = module.opt.ledger.steps
    assert steps == 8
    assert (max(moved) < 0.5 * 1.01e-6 * steps) == (value is not None)


def test_lightning_accumulates_by_hand(lightning):
    loader = loader_of(poisson().in_parts(PARTS))

    def training_step(self, batch, index):
        x, y = batch
        opt = self.optimizers()
        if len(x):
            with opt.record():
                self.manual_backward(F.cross_entropy(self.model(x), y))
        else:
            opt.empty_batch()
        if (index + 1) % PARTS == 0:
            opt.step()
            opt.zero_grad()

    module = fit(lightning, loader, lambda p: private(p, loader), training_step)
    assert_same(module.model, expected())
    assert module.opt.ledger.steps == 8


def test_lightning_manual_optimization_with_a_closure(lightning):
    loader = loader_of(poisson())

    def training_step(self, batch, index):
        x, y = batch

        def closure():
            loss = F.cross_entropy(self.model(x), y)
            self.manual_backward(loss)
            return loss

        self.optimizers().step(closure=closure)

    module = fit(lightning, loader, lambda p: private(p, loader), training_step)
    assert_same(module.model, expected())


def test_lightning_does_not_share_out_poisson_batches(lightning):
    """On several processes it would put a sampler of its own in place of this one."""
    from lightning.pytorch.utilities.data import _update_dataloader

    loader = loader_of(poisson())
    with refused(r"Trainer\(use_distributed_sampler=False\)"):
        _update_dataloader(loader, torch.utils.data.DistributedSampler(data(), 2, 0))


def test_lightning_accumulation_without_hands_is_refused(lightning):
    loader = loader_of(poisson().in_parts(2))
    with refused("accumulate_grad_batches.*manual optimization"):
        fit(lightning, loader, lambda p: private(p, loader), accumulate_grad_batches=2)


@pytest.fixture
def accelerate():
    package = pytest.importorskip("accelerate")
    yield package
    package.state.AcceleratorState._reset_state(True)
    package.state.GradientState._reset_state()


@pytest.mark.parametrize("parts", [1, PARTS])
@pytest.mark.parametrize("prepared", [False, True])
def test_accelerate_accumulates_the_parts(accelerate, parts, prepared):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=parts)
    loader = loader_of(poisson().in_parts(parts) if parts > 1 else poisson())
    model = network()
    if prepared:
        loader = accelerator.prepare(loader)
    recorder = private(model.parameters(), loader)
    model, opt = accelerator.prepare(model, recorder)
    for _ in range(2):
        for x, y in loader:
            with accelerator.accumulate(model):
                with recorder.record():
                    accelerator.backward(F.cross_entropy(model(x), y) * parts)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1e3)
                opt.step()
                opt.zero_grad()
    assert_same(model, expected())
    assert (recorder.ledger.steps, recorder.sampler) == (8, "poisson")


def test_accelerate_does_not_share_out_poisson_batches(accelerate):
    """On two processes it ran half of the steps."""
    accelerate.Accelerator(cpu=True)
    prepare = accelerate.data_loader.prepare_data_loader
    two = {"num_processes": 2, "process_index": 1}
    with refused(r"keep its loader out of accelerator\.prepare"):
        prepare(loader_of(poisson()), **two)
    shuffled = prepare(DataLoader(data(), batch_size=8, shuffle=True), **two)
    with refused("BatchSamplerShard: it hands each process every other batch"):
        private(network().parameters(), shuffled)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def gpt2(transformers):
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    words = {"bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(**sizes, **dropout, **words)
    return transformers.GPT2LMHeadModel(config).double()


def sentences():
    """Of different lengths: the number of tokens of a batch is not a sample's own."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length in torch.randint(3, 9, (24,), generator=draw).tolist():
        ids = torch.randint(1, 20, (8,), generator=draw)
        labels = ids.clone()
        labels[length:] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def trained(transformers, folder, parts, epochs=2, size=4, **options):
    class Trainer(PrivateTrainerMixin, transformers.Trainer):
        pass

    model, rows = gpt2(transformers), sentences()
    sampler = PoissonBatchSampler(
        rows, expected_batch_size=size, generator=torch.Generator().manual_seed(3)
    )
    sampler = sampler.in_parts(parts) if parts > 1 else sampler
    opt = curvopt.DPSGD(
        model.named_parameters(), 0.5, noise_multiplier=0.0, max_grad_norm=CLIP,
        expected_batch_size=size, sampler=sampler,
    )  # fmt: skip
    settings = transformers.TrainingArguments(
        output_dir=folder, num_train_epochs=epochs, gradient_accumulation_steps=parts,
        use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
        lr_scheduler_type="constant", **options,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=settings, train_dataset=rows, optimizers=(opt, None), sampler=sampler
    )
    trainer.train()
    return model, opt, trainer


def by_hand(transformers, epochs=2, size=4):
    """Loops over batches of one, and plain steps along the sum of the clipped gradients."""
    model, rows = gpt2(transformers), sentences()
    params = list(model.parameters())
    sampler = PoissonBatchSampler(
        rows, expected_batch_size=size, generator=torch.Generator().manual_seed(3)
    )
    sizes = []
    for _ in range(epochs):
        for batch in sampler:
            sizes.append(len(batch))
            total = [torch.zeros_like(p) for p in params]
            for n in batch:
                one = {key: value[None] for key, value in rows[n].items()}
                grads = torch.autograd.grad(model(**one).loss, params)
                norm = torch.cat([g.flatten() for g in grads]).norm()
                for t, g in zip(total, grads, strict=True):
                    t += g * min(1.0, CLIP / (norm + 1e-6))
            with torch.no_grad():
                for p, t in zip(params, total, strict=True):
                    p -= 0.5 * t / size
    return model, sizes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("parts", "size"), [(1, 4), (2, 4), (2, 1)])
def test_trainer(transformers, tmp_path, parts, size):
    epochs = 1 if size == 1 else 2
    model, opt, trainer = trained(
        transformers, tmp_path, parts, size=size, epochs=epochs, max_grad_norm=0.0
    )
    theirs, sizes = by_hand(transformers, size=size, epochs=epochs)
    assert 0 in sizes or size > 1
    assert_same(model, list(theirs.parameters()), 1e-7)
    assert opt.ledger.steps == len(sizes) == trainer.state.global_step
    assert opt.sample_rate == size / 24


@pytest.mark.filterwarnings("ignore")
def test_trainer_clips_the_private_gradient(transformers, tmp_path):
    model, opt, trainer = trained(transformers, tmp_path, 1, epochs=1, max_grad_norm=1e-6)
    start = gpt2(transformers)
    for p, q in zip(model.parameters(), start.parameters(), strict=True):
        assert (p - q).norm() <= 0.5 * 1.01e-6 * opt.ledger.steps
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert all(0 < norm <= CLIP * 24 for norm in norms)


@pytest.mark.filterwarnings("ignore")
def test_trainer_without_the_recipe_is_refused(transformers, tmp_path):
    class Recorded(transformers.Trainer):
        def training_step(self, *args, **kwargs):
            with getattr(self.optimizer, "optimizer", self.optimizer).record():
                return super().training_step(*args, **kwargs)

    model, rows = gpt2(transformers), sentences()
    opt = private(model.named_parameters(), "none", noise_multiplier=1.0)
    settings = transformers.TrainingArguments(
        output_dir=tmp_path, per_device_train_batch_size=4, max_steps=1, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Recorded(model=model, args=settings, train_dataset=rows, optimizers=(opt, None))
    with refused("num_items_in_batch.*PrivateTrainerMixin"):
        trainer.train()
    assert opt.ledger.steps == 0


@pytest.mark.filterwarnings("ignore")
def test_trainer_accumulates_as_many_parts(transformers, tmp_path):
    class Trainer(PrivateTrainerMixin, transformers.Trainer):
        pass

    model, rows = gpt2(transformers), sentences()
    sampler = PoissonBatchSampler(rows, 0.1)
    settings = transformers.TrainingArguments(
        output_dir=tmp_path, gradient_accumulation_steps=2, use_cpu=True, report_to=[]
    )
    opt = private(model.parameters(), sampler)
    with refused(r"gradient_accumulation_steps=2.*sampler.in_parts\(2\)"):
        Trainer(
            model=model, args=settings, train_dataset=rows, optimizers=(opt, None), sampler=sampler
        )


def test_a_collated_batch_without_samples():
    collate = EmptyBatchCollate(sentences(), None)
    assert curvopt.privacy.trainer.batch_length(collate([])) == 0
