"""Accelerate and Lightning on two processes take the steps that one takes with the whole batch."""

import os
import warnings
from functools import partial

import pytest
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler

from tests.parallel import cases
from tests.parallel.ranks import alone, part, ranks, same_everywhere

MEASURING = ["ggn_exact", "variance_adaptive", "polar"]


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
    assert max(float((a - b).abs().max()) for a, b in zip(expected, start, strict=True)) > 0.01
    assert max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)) < 1e-12


@pytest.mark.parametrize("optimizer", MEASURING)
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
        accelerator.backward(F.cross_entropy(wrapped(x), y))
        opt.step()
    check(model, expected)


@pytest.mark.parametrize("optimizer", MEASURING)
@ranks(timeout=60)
def test_lightning(optimizer):
    as_under_torchrun()
    warnings.simplefilter("ignore")  # Lightning's advice
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = cases.mlp().double()

        def training_step(self, batch):
            x, y = batch
            return F.cross_entropy(self.model(x), y)

        def configure_optimizers(self):
            return cases.OPTIMIZERS[optimizer](self.parameters())

    expected, module = one_process(optimizer), Module()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    assert trainer.world_size == 2
    parts = [part(*batch) for batch in cases.batches()]
    trainer.fit(module, DataLoader(parts, batch_size=None))
    check(module.model, expected)


@pytest.mark.parametrize("optimizer", MEASURING)
@ranks(timeout=60)
def test_trainer(optimizer, tmp_path):
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
        schedule = transformers.get_scheduler("linear", opt, 0, cases.STEPS)
        for x, labels in cases.batches():
            net(x, labels)["loss"].backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            schedule.step()
            opt.zero_grad()
        return cases.weights(net)

    if optimizer == "polar":
        cases.share_signs()
    expected, net = reference(), Classifier()
    # Process r takes every other batch of N / 2: those of the whole batch, one after the other.
    rows = [{"x": x, "labels": y} for batch in cases.batches() for x, y in zip(*batch, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=cases.N // 2, num_train_epochs=1,
    )  # fmt: skip
    opt = cases.OPTIMIZERS[optimizer](net.parameters())
    trainer = InOrder(net, arguments, train_dataset=rows, optimizers=(opt, None))
    assert trainer.args.world_size == 2
    trainer.train()
    assert opt.steps == cases.STEPS
    assert trainer.model_wrapped.find_unused_parameters  # so that the loss is handed on
    check(net.model, expected)
