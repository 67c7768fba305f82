"""Accelerate and Lightning on two processes take the steps that one takes with the whole batch."""

import os
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler

from tests.oracles import assert_close
from tests.parallel import cases
from tests.parallel.ranks import alone, everywhere, part, ranks, same_everywhere

MEASURING = ["ggn_exact", "variance_adaptive", "polar"]
PRIVATE = ["dp_sgd", "dp_adam"]


@pytest.fixture(scope="module", autouse=True)
def _imported_once():
    """Here, not in every process."""
    for name in ("accelerate", "lightning.pytorch.strategies", "transformers.trainer"):
        pytest.importorskip(name)


def as_under_torchrun():
    """What torchrun tells a process of itself; the processes have met already."""
    os.environ.update(
        RANK=str(dist.get_rank()),
        LOCAL_RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()),
        LOCAL_WORLD_SIZE=str(dist.get_world_size()),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
        TORCHELASTIC_RUN_ID="none",
        OMP_NUM_THREADS="1",
    )
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # of tests in the parent process
    GradientState._reset_state()


def one_process(optimizer):
    if optimizer == "polar":
        cases.share_signs()
    model = cases.mlp().double()
    cases.train(partial(cases.OPTIMIZERS[optimizer], process_group=alone()), model, model)
    return cases.weights(model)


def check(model, expected):
    found, start = cases.weights(model), cases.weights(cases.mlp().double())
    same_everywhere(found)
    assert max(float((a - b).abs().max()) for a, b in zip(expected, start, strict=True)) > 1e-3
    assert max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)) < 1e-12


@pytest.mark.parametrize("optimizer", [*MEASURING, *PRIVATE])
@ranks(timeout=60)
def test_accelerate(optimizer):
    as_under_torchrun()
    from accelerate import Accelerator

    expected, model = one_process(optimizer), cases.mlp().double()
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    wrapped, opt = accelerator.prepare(model, cases.OPTIMIZERS[optimizer](model.parameters()))
    for batch in cases.batches():
        x, y = part(*batch)
        opt.zero_grad()
        with opt.optimizer.record() if optimizer in PRIVATE else nullcontext():
            accelerator.backward(F.cross_entropy(wrapped(x), y))
        opt.step()
    check(model, expected)


def in_halves(x, y):
    """The micro-batches of one process that are, together, those of two: each takes its half."""
    order = torch.cat([torch.arange(cases.N).view(2, 2, -1)[:, k].flatten() for k in range(2)])
    return zip(x[order].chunk(2), y[order].chunk(2), strict=True)


@pytest.mark.parametrize("optimizer", ["variance_adaptive", "polar"])
@ranks(timeout=60)
def test_accelerate_accumulates_clips_and_goes_on(optimizer, tmp_path):
    """With a schedule, of which accelerate takes as many steps as there are processes."""
    as_under_torchrun()
    from accelerate import Accelerator

    def schedule(opt):
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 0.9**k)

    def made():
        model = cases.mlp().double()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        opt = cases.OPTIMIZERS[optimizer](model.parameters())
        return model, accelerator, *accelerator.prepare(model, opt, schedule(opt))

    def go(accelerator, wrapped, opt, rates, begin, end):
        for batch in [*cases.batches(end)][begin:]:
            for x, y in zip(*(tensor.chunk(2) for tensor in part(*batch)), strict=True):
                with accelerator.accumulate(wrapped):
                    accelerator.backward(F.cross_entropy(wrapped(x), y))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(wrapped.parameters(), 0.5)
                    opt.step()
                    rates.step()
                    opt.zero_grad()

    reference = cases.mlp().double()
    one = cases.OPTIMIZERS[optimizer](reference.parameters(), process_group=alone())
    rates = schedule(one)
    for batch in cases.batches(6):
        for x, y in in_halves(*batch):
            (F.cross_entropy(reference(x), y) / 2).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        one.step()
        one.zero_grad()
        rates.step()
        rates.step()
    (folder,) = set(everywhere(str(tmp_path)))
    model, accelerator, *rest = made()
    go(accelerator, *rest, 0, 3)
    accelerator.save_state(folder)
    model, accelerator, *rest = made()
    accelerator.load_state(folder)
    go(accelerator, *rest, 3, 6)
    check(model, cases.weights(reference))


def trainer_of(module, batches, **options):
    import lightning

    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        **options,
    )  # fmt: skip
    assert trainer.world_size == 2
    parts = [part(*batch) for batch in batches]
    trainer.fit(module, DataLoader(parts, batch_size=None), DataLoader(parts[:2], batch_size=None))


@pytest.mark.parametrize("optimizer", ["ggn_exact", "polar"])
@ranks(timeout=60)
def test_lightning_accumulates_clips_and_evaluates(optimizer):
    """Five batches, two a step: the last step has one."""
    as_under_torchrun()
    warnings.simplefilter("ignore")  # Lightning's advice
    if optimizer == "polar":
        cases.share_signs()
    batches = [*cases.batches(5)]
    reference, module = cases.mlp().double(), module_of(optimizer)()
    one = cases.OPTIMIZERS[optimizer](reference.parameters(), process_group=alone())
    for window in (batches[:2], batches[2:4], batches[4:]):
        for x, y in window:
            (F.cross_entropy(reference(x), y) / 2).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        one.step()
        one.zero_grad()
    trainer_of(
        module, batches, strategy="ddp", accumulate_grad_batches=2, gradient_clip_val=0.5,
        val_check_interval=2,
    )  # fmt: skip
    check(module.model, cases.weights(reference))


@pytest.mark.parametrize("optimizer", MEASURING)
@ranks(timeout=60)
def test_lightning_by_hand_with_two_optimizers(optimizer):
    """The wrapper's call is around all of a training step: two backward passes and two steps."""
    as_under_torchrun()
    warnings.simplefilter("ignore")  # Lightning's advice
    import lightning

    class Pair(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            torch.manual_seed(0)
            self.g, self.d = nn.Linear(5, 5).double(), nn.Linear(5, 3).double()

        def losses(self, x, y):
            yield F.cross_entropy(self.d(self.g(x).detach()), y)
            yield F.cross_entropy(self.d(self.g(x)), 2 - y)

        def training_step(self, batch):
            for opt, k in zip(self.optimizers(), range(2), strict=True):
                self.toggle_optimizer(opt)
                self.manual_backward([*self.losses(*batch)][k])
                opt.step()
                opt.zero_grad()
                self.untoggle_optimizer(opt)

        def validation_step(self, batch):
            self.d(self.g(batch[0]))

        def made(self, **options):
            make = cases.OPTIMIZERS[optimizer]
            return [make(net.parameters(), **options) for net in (self.d, self.g)]

        def configure_optimizers(self):
            return self.made()

    if optimizer == "polar":
        cases.share_signs()
    reference, module = Pair(), Pair()
    ones = reference.made(process_group=alone())
    for batch in cases.batches(6):
        for k, (opt, net) in enumerate(zip(ones, (reference.g, reference.d), strict=True)):
            net.requires_grad_(False)
            [*reference.losses(*batch)][k].backward()
            opt.step()
            opt.zero_grad()
            net.requires_grad_(True)
    trainer_of(module, cases.batches(6), strategy="ddp_find_unused_parameters_true")
    found = cases.weights(module)
    same_everywhere(found)
    for p, expected in zip(found, cases.weights(reference), strict=True):
        assert_close(p, expected, 1e-12)


def module_of(optimizer):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = cases.mlp().double()

        def training_step(self, batch):
            x, y = batch
            return F.cross_entropy(self.model(x), y)

        def validation_step(self, batch):
            self.model(batch[0])

        def configure_optimizers(self):
            return cases.OPTIMIZERS[optimizer](self.parameters())

    return Module


@pytest.mark.parametrize("optimizer", ["variance_adaptive", "polar"])
@ranks(timeout=60)
def test_lightning_shards(optimizer):
    """Its strategy slices the mesh anew for every layer."""
    as_under_torchrun()
    warnings.simplefilter("ignore")  # Lightning's advice
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    class Sharded(module_of(optimizer)):
        def configure_model(self):
            for layer in [m for m in self.model if isinstance(m, nn.Linear)] + [self.model]:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    expected, module = one_process(optimizer), Sharded()
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
    )
    trainer_of(module, cases.batches(), strategy=strategy)
    check(module.model, expected)


@pytest.mark.parametrize("optimizer", [*MEASURING, *PRIVATE])
@ranks(timeout=60)
def test_lightning(optimizer):
    as_under_torchrun()
    warnings.simplefilter("ignore")  # Lightning's advice
    expected, module = one_process(optimizer), module_of(optimizer)()
    trainer_of(module, cases.batches(), strategy="ddp")
    check(module.model, expected)


@pytest.mark.parametrize(
    ("optimizer", "accumulate"),
    [*((name, 1) for name in MEASURING), ("variance_adaptive", 2), ("polar", 2)],
)
@ranks(timeout=90)
def test_trainer(optimizer, accumulate, tmp_path):
    """Two batches a step, evaluation between, and resumed in the middle of an epoch as well."""
    as_under_torchrun()
    warnings.simplefilter("ignore")  # transformers' advice
    import transformers

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = cases.mlp().double()

        def forward(self, x, labels):
            logits = self.model(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    def reference():
        """With what Trainer does by default: a schedule, and clipping."""
        net = Classifier()
        opt = cases.OPTIMIZERS[optimizer](net.parameters(), process_group=alone())
        steps, batches = cases.STEPS // accumulate, [*cases.batches()]
        schedule = transformers.get_scheduler("linear", opt, 0, steps)
        for k in range(steps):
            for x, labels in batches[k * accumulate : (k + 1) * accumulate]:
                (net(x, labels)["loss"] / accumulate).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            schedule.step()
            opt.zero_grad()
        return cases.weights(net)

    if optimizer == "polar":
        cases.share_signs()
    expected = reference()
    (folder,) = set(everywhere(str(tmp_path)))
    # Process r takes every other batch of N / 2: those of the whole batch, one after the other.
    rows = [{"x": x, "labels": y} for batch in cases.batches() for x, y in zip(*batch, strict=True)]
    options = dict(gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2)
    options |= dict(save_strategy="steps", save_steps=4)
    arguments = transformers.TrainingArguments(
        output_dir=folder, use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=cases.N // 2, num_train_epochs=1,
        **(options if accumulate > 1 else {}),
    )  # fmt: skip
    for resumed in [None, f"{folder}/checkpoint-4"][:accumulate]:
        net = Classifier()
        opt = cases.OPTIMIZERS[optimizer](net.parameters())
        trainer = InOrder(
            net, arguments, train_dataset=rows, eval_dataset=rows[:8], optimizers=(opt, None)
        )
        assert trainer.args.world_size == 2
        trainer.train(resume_from_checkpoint=resumed)
        assert opt.steps == cases.STEPS // accumulate
        assert trainer.model_wrapped.find_unused_parameters  # so that the loss is handed on
        check(net.model, expected)
