"""Private steps in `transformers.Trainer`, by a mixin that needs nothing of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from curvopt.errors import CurvoptError
from curvopt.privacy.loaders import parts_of
from curvopt.privacy.sampling import (
    EmptyBatchCollate,
    MicroBatchSampler,
    PoissonBatchSampler,
    batch_length,
)


class PrivateTrainerMixin:
    """A `transformers.Trainer` whose optimizer is private.

    It records the forward and backward pass of each batch, draws batches with a Poisson sampler,
    takes the step of an empty batch without the model, and lets every sample count by its own
    loss: the mean over its tokens, whatever the number of tokens in the batch
    (``num_items_in_batch``) or of batches that are accumulated.

    Clipping by the Trainer (``max_grad_norm``, 1 by default) acts on the private gradient, which
    the private optimizer has bounded already: set it to 0. The loss that is logged is not private.

    Args:
        *args: as in `transformers.Trainer`.
        sampler: draws the batches; in as many parts as ``gradient_accumulation_steps``
            (`PoissonBatchSampler.in_parts`). The private optimizer gets the same sampler.
        **kwargs: as in `transformers.Trainer`; ``optimizers=(optimizer, scheduler)`` is needed.

    Raises:
        CurvoptError: the sampler's parts are not the steps that are accumulated.

    Example:
        ::

            class PrivateTrainer(curvopt.privacy.PrivateTrainerMixin, transformers.Trainer):
                pass

            trainer = PrivateTrainer(
                model=model, args=settings, train_dataset=data, optimizers=(opt, None),
                sampler=sampler,
            )
    """

    # Of transformers.Trainer.
    args: Any
    optimizer: Any
    train_dataset: Any
    data_collator: Any

    def __init__(
        self, *args: Any, sampler: PoissonBatchSampler | MicroBatchSampler, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sampler, self.parts = sampler, parts_of(sampler)
        accumulated = self.args.gradient_accumulation_steps
        if accumulated != self.parts:
            raise CurvoptError(
                f"gradient_accumulation_steps={accumulated}, and the sampler hands out each "
                f"logical batch in {self.parts} parts: give sampler.in_parts({accumulated}) to "
                "the optimizer and to the trainer"
            )
        self.model_accepts_loss_kwargs = False  # a count of the batch is not a sample's own

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches that the sampler draws, as they are: shared out, they would be others."""
        collate = EmptyBatchCollate(self.train_dataset, self.data_collator)
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One recorded pass; of an empty batch, none."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        if not batch_length(inputs):
            optimizer.empty_batch()
            return torch.zeros((), device=self.args.device)
        self.current_gradient_accumulation_steps = 1  # the loss is not to be divided
        with optimizer.record():
            loss: Tensor = super().training_step(model, inputs)  # type: ignore[misc]  # a mixin: Trainer has it
        return loss / self.parts
