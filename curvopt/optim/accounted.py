"""What a private optimizer is told, what it has spent, and what it saves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Generator, Tensor

from curvopt.axes.views import ViewOrder
from curvopt.errors import CurvoptError
from curvopt.optim.checkpoint import pack, reserve, unpack
from curvopt.optim.clip import Clip, Clipping, check_norm
from curvopt.optim.private_stats import PrivateStats
from curvopt.parallel.shards import is_sharded
from curvopt.privacy.accounting import PrivacyLedger
from curvopt.privacy.checks import require
from curvopt.privacy.clipping import QuantileClipping
from curvopt.privacy.epsilon import Accountant
from curvopt.privacy.loaders import Source, check_ranks, parts_of, sampling_of
from curvopt.privacy.noise import GaussianNoise
from curvopt.privacy.report import PrivacyReport
from curvopt.privacy.schedules import Schedule

Sampler = Source


class Accounted(PrivateStats):
    """The settings of private optimizers, their ledger and their state.

    The arguments are those of `DPSGD`.

    Attributes:
        parts: in how many parts the sampler hands out each logical batch; else as in
            `PrivateOptimizer`.
    """

    saved = ("steps", "nonfinite_samples")
    _clip: Clip
    # Whether the loss has a term that holds no sample.
    _penalized = False

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        noise_multiplier: float | Schedule,
        max_grad_norm: float | Schedule | QuantileClipping,
        expected_batch_size: float,
        clipping: Clipping = "flat",
        sampler: Sampler = "none",
        sample_rate: float | None = None,
        num_samples: int | None = None,
        generator: Generator | None = None,
        secure_noise: bool = False,
        process_group: Any = None,
        batch_size: int | None = None,
        reduction: str | None = None,
        views: int = 1,
        view_order: ViewOrder = "sample",
    ):
        require(views >= 1 and int(views) == views, "views", views, "an integer >= 1")
        require(view_order in ("sample", "view"), "view_order", view_order, "'sample' or 'view'")
        self.views, self.view_order = views, view_order
        if not callable(noise_multiplier):
            check_noise(noise_multiplier)
        if not (callable(max_grad_norm) or isinstance(max_grad_norm, QuantileClipping)):
            check_norm(max_grad_norm, clipping)
        size = expected_batch_size
        require(0 < size < math.inf, "expected batch size", size, "must be positive and finite")
        require(clipping in ("flat", "per_layer", "automatic"), "clipping", clipping, "is unknown")
        super().__init__(
            params,
            defaults,
            batch_size=batch_size,
            reduction=reduction,
            process_group=process_group,
        )
        self.noise_multiplier, self.max_grad_norm = noise_multiplier, max_grad_norm
        self.expected_batch_size, self.clipping = expected_batch_size, clipping
        self.sampler, self.sample_rate, num_samples = sampling_of(
            sampler, sample_rate, num_samples, expected_batch_size
        )
        self.ledger = PrivacyLedger(num_samples)
        self.norms: Tensor | None = None
        self.nonfinite_samples = 0
        self._noise = GaussianNoise(generator, secure=secure_noise)
        self._place = self._ranks.place
        check_ranks(sampler, *self._place)
        self.parts = parts_of(sampler)
        self._sizes = (-1, 0)  # of the last logical batch, and how often in a row

    # -- what it costs, and what was seen ---------------------------------------------------------

    def privacy_spent(self, delta: float, accountant: Accountant = "pld") -> float:
        """The epsilon spent so far; see `curvopt.privacy.PrivacyLedger.epsilon`."""
        return self.ledger.epsilon(delta, accountant)

    def privacy_report(
        self, delta: float, accountant: Accountant = "pld", unit: str = "one sample"
    ) -> PrivacyReport:
        """All that makes the epsilon mean something; see `curvopt.privacy.PrivacyLedger.report`."""
        return self.ledger.report(delta, accountant, unit)

    # -- several processes ------------------------------------------------------------------------

    def _meet(self, norms: Tensor, penalties: Mapping[Tensor, Tensor]) -> Tensor:
        """The norms of all processes, once they agree on the step.

        Args:
            norms: of this process.
            penalties: gradients of terms that hold no sample, which all processes must have alike.
        """
        if self._ranks.place != self._place:
            raise CurvoptError(
                "torch.distributed was initialized, or changed, after this optimizer was built, so "
                "its sampler was not checked: build it afterwards, and load its state_dict"
            )
        self._met = True
        if not self._ranks.many:
            return norms
        settings = {
            "steps taken": self.ledger.steps,
            "noise_multiplier": self._sigma,
            "max_grad_norm": self._clip.max_norm,
            "expected_batch_size": self.expected_batch_size,
            "clipping": self.clipping,
            "sampling": (self.sampler, self.sample_rate),
            "parameters in terms of the loss that hold no sample": len(penalties),
        }
        if not self._agreed:  # later steps are the same for all
            settings["the gradients' sum of terms that hold no sample"] = sum(
                float(grad.double().sum()) for grad in penalties.values()
            )
            settings["the parameters' sum"] = sum(
                float(p.double().sum()) for p in self._parameters() if not is_sharded(p)
            )
        told = self._ranks.meet(settings, len(norms))
        if not self._agreed:  # one run, which any process may be asked to go on with
            self.ledger.run_name = self._ranks.value_of_first(self.ledger.run_name)
        self._agreed = True
        return self._ranks.concatenated(norms, [count for (count,) in told])

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As in the base, and ``"privacy"``: ledger, noise generators, adaptive clipping norm.

        It is as secret as the data, for the noise can be computed from it.
        """
        clip = self.max_grad_norm
        privacy = {
            "ledger": self.ledger.state_dict(),
            "line": self.ledger.line(),
            # Others than the first process draw none.
            "noise": self._noise.state_dict() if self._ranks.first else None,
            "parts": self._noise.shared(),  # of parameters that are divided: the same on all
            "clipping": clip.state_dict() if isinstance(clip, QuantileClipping) else {},
        }
        return pack(super().state_dict() | {"privacy": privacy})

    def _reserve(self) -> None:
        reserve(self.param_groups, noise=self._ranks.first)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, with the noise that would have come next.

        Steps that were taken here since it was saved stay in the ledger, for what they have shown
        remains known; and no noise is drawn twice: the generators then go on from where they are.

        Raises:
            CurvoptError: the state is that of an optimizer that was not private.
        """
        state_dict = unpack(state_dict)
        if "privacy" not in state_dict:
            raise CurvoptError(
                "the state has no privacy ledger, so what was spent before is unknown: load a "
                f"state of {type(self).__name__}"
            )
        privacy = state_dict["privacy"]
        if privacy["noise"] is None and self._ranks.first:
            raise CurvoptError(
                "the state is that of another process than the first, so the noise would start "
                "over: load the one that the first process saved"
            )
        super().load_state_dict(state_dict)
        self._agreed = False
        if not self.ledger.put_back(privacy["ledger"], privacy.get("line", ())):
            self._noise.load_state_dict((privacy["noise"] or {}) | (privacy.get("parts") or {}))
        if isinstance(self.max_grad_norm, QuantileClipping):
            self.max_grad_norm.load_state_dict(privacy["clipping"])


def check_noise(sigma: float) -> float:
    """The noise multiplier, or an error."""
    require(0 <= sigma < math.inf, "noise multiplier", sigma, "must be finite and at least 0")
    return sigma
