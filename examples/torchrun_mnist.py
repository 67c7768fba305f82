"""Trains on MNIST in several processes: data parallel, sharded, or private.

    torchrun --nproc_per_node 2 examples/torchrun_mnist.py
    torchrun --nproc_per_node 2 examples/torchrun_mnist.py --shard --optimizer variance_adaptive
    torchrun --nproc_per_node 2 examples/torchrun_mnist.py --optimizer dp_sgd --epochs 4

The loop is that of one process: only the model is wrapped, and the data are divided. A checkpoint
of `torch.distributed.checkpoint` is written into `--out`; `--resume` goes on from one, with another
number of processes too.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import curvopt
from curvopt.datasets import mnist
from curvopt.privacy import EmptyBatchCollate, PoissonBatchSampler


def network() -> nn.Sequential:
    """Builds the model, the same in all processes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def prepare(name: str, model: nn.Module, data: TensorDataset, batch: int):
    """Builds the optimizer, and the loader of this process's samples.

    Args:
        name: of the optimizer.
        model: whose parameters are trained.
        data: the data set.
        batch: samples of a step, of all processes together.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if name == "dp_sgd":  # one logical batch over all processes: each draws from its own samples
        sampler = PoissonBatchSampler(
            len(data), expected_batch_size=batch, rank=rank, num_replicas=world
        )
        optimizer = curvopt.DPSGD(
            model.parameters(),
            lr=0.5,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=batch,
            sampler=sampler,
        )
        collate = EmptyBatchCollate(data)  # an empty batch is a step as well
        return optimizer, DataLoader(data, batch_sampler=sampler, collate_fn=collate)
    kinds = {
        "diag_ggn": curvopt.DiagGGNOptimizer,
        "variance_adaptive": curvopt.VarianceAdaptiveSGD,
        "polar": curvopt.PolarOptimizer,
    }
    sampler = DistributedSampler(data, world, rank, shuffle=True, drop_last=True)
    loader = DataLoader(data, batch // world, sampler=sampler)
    return kinds[name](model.parameters()), loader


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Returns the share of images that the model classifies correctly, the same on all."""
    hits = [
        (model(x).argmax(1) == y).sum()
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    ]
    return sum(hits).item() / len(labels)


def main() -> None:
    """Reads the arguments, and trains among the processes that torchrun has started."""
    parser = argparse.ArgumentParser(
        description="Trains on MNIST in several processes; start it by torchrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--optimizer",
        choices=["diag_ggn", "variance_adaptive", "polar", "dp_sgd"],
        default="diag_ggn",
        help="which one",
    )
    parser.add_argument("--shard", action="store_true", help="divide the parameters: fully_shard")
    parser.add_argument("--epochs", type=int, default=2, help="over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="of all processes together")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the samples")
    parser.add_argument("--data-dir", help="folder of MNIST's IDX files (None: found or fetched)")
    parser.add_argument("--out", type=Path, default="runs/torchrun", help="folder for checkpoints")
    parser.add_argument("--resume", help="folder of a checkpoint to go on from")
    parser.add_argument("--smoke", action="store_true", help="two epochs of 512 images, as a check")
    args = parser.parse_args()

    dist.init_process_group("gloo")  # "nccl" on GPUs, with torch.cuda.set_device(local rank)
    train(args)  # which lets go of the model before the processes part
    dist.barrier()  # nobody waits for this process any more
    dist.destroy_process_group()
    # DTensor's caches hold the group after `fully_shard`, and with it gloo's threads: one that lets
    # go of its last tensor while Python is being torn down aborts the process. So it ends here.
    sys.stdout.flush()
    os._exit(0)


def train(args: argparse.Namespace) -> None:
    """Trains, and prints the loss and the accuracy after each epoch."""
    data, few = mnist(args.data_dir), slice(512 if args.smoke else None)
    images, labels = data.train_images[few], data.train_labels[few]
    tests = data.test_images[few], data.test_labels[few]

    model = network()
    wrapped = fully_shard(model) if args.shard else DistributedDataParallel(model)
    samples = TensorDataset(images, labels)
    optimizer, loader = prepare(args.optimizer, model, samples, args.batch_size)
    epochs = range(args.epochs)
    if args.resume:
        states = get_state_dict(model, optimizer)
        saved = {"model": states[0], "optimizer": states[1], "epochs": 0}
        dcp.load(saved, checkpoint_id=args.resume)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
        epochs = range(saved["epochs"], saved["epochs"] + args.epochs)

    for epoch in epochs:
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(args.seed * 1000 + epoch)
        total = torch.zeros(2)
        for x, y in loader:
            # As in one process.
            loss = optimizer.step(lambda x=x, y=y: F.cross_entropy(wrapped(x), y))
            if len(y):
                total += torch.tensor([loss.item(), 1.0])
        dist.all_reduce(total)
        right = accuracy(wrapped, *tests)
        if dist.get_rank() == 0:
            spent = ""
            if args.optimizer == "dp_sgd":
                spent = f", epsilon {optimizer.privacy_spent(1e-5):.2f} at delta 1e-5"
            print(
                f"epoch {epoch + 1}: loss {total[0] / total[1]:.4f}, test accuracy {right:.2%}"
                f" ({optimizer.steps} steps{spent})",
                flush=True,
            )
    states = get_state_dict(model, optimizer)
    saved = {"model": states[0], "optimizer": states[1], "epochs": epochs[-1] + 1}
    dcp.save(saved, checkpoint_id=args.out / f"epoch{epochs[-1] + 1}")


if __name__ == "__main__":
    main()
