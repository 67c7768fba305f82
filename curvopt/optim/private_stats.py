"""What a private optimizer can say about its last step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from curvopt.optim.base import EngineOptimizer
from curvopt.optim.stats import Stats
from curvopt.parallel.groups import Ranks
from curvopt.privacy.accounting import PrivacyLedger
from curvopt.privacy.epsilon import Accountant
from curvopt.privacy.noise import GaussianNoise


class PrivateStats(EngineOptimizer):
    """The numbers of a private step, those apart that are not private themselves."""

    ledger: PrivacyLedger
    norms: Tensor | None
    nonfinite_samples: int
    expected_batch_size: float
    _noise: GaussianNoise
    _sigma: float
    _std: float
    _clip: Any

    @property
    def clip_fraction(self) -> float:
        """Share of the last logical batch's samples that were longer than C. Not private."""
        if self.norms is None or not len(self.norms):
            return 0.0
        return float((self.norms > self._clip.max_norm).double().mean())

    def stats(
        self,
        *,
        per_tensor: bool = True,
        delta: float | None = None,
        accountant: Accountant = "pld",
    ) -> dict[str, float]:
        """Numbers to log, at any time: a flat dict of floats, for TensorBoard, W&B, ``log_dict``.

        After a step, beside ``steps`` and ``lr``:

        * ``noise_multiplier``, ``max_grad_norm``: sigma and C of the last step;
        * ``noise_std``: the noise's standard deviation in each element of ``p.grad``, sigma C / B;
        * ``epsilon``: spent so far, if ``delta`` is given;
        * ``not_private/clip_fraction``, ``not_private/median_norm``, ``not_private/batch_size``,
          ``not_private/nonfinite_samples``: the share of samples longer than C, the median of
          their gradients' norms (of a batch that is not empty), how many they were, and how many
          were left out so far. They are computed from the data without noise: whoever sees them
          sees more than epsilon accounts for.

        Args:
            per_tensor: no numbers of single tensors are kept here.
            delta: of the epsilon; see `curvopt.privacy.PrivacyLedger.epsilon`, which needs
                ``dp-accounting`` and some tenths of a second when it is first called.
            accountant: of the epsilon.

        Example:
            >>> model = torch.nn.Linear(4, 3)
            >>> opt = curvopt.DPSGD(
            ...     model.parameters(), 0.1, noise_multiplier=1.0, max_grad_norm=1.0,
            ...     expected_batch_size=8, sampler="poisson", sample_rate=0.01,
            ... )
            >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
            >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y))
            >>> opt.stats(delta=1e-5)["epsilon"] < 1.5
            True
        """
        found = super().stats(per_tensor=per_tensor)
        if delta is not None:
            found["epsilon"] = self.ledger.epsilon(delta, accountant)
        return found

    def _stats(self) -> Stats:
        if self.norms is None:
            return Stats()
        found = {
            "noise_multiplier": self._sigma,
            "max_grad_norm": self._clip.max_norm,
            "noise_std": self._std / self.expected_batch_size,
            "not_private/clip_fraction": self.clip_fraction,
            "not_private/batch_size": len(self.norms),
            "not_private/nonfinite_samples": self.nonfinite_samples,
        }
        if len(self.norms):
            found["not_private/median_norm"] = self.norms.median().item()
        return Stats(found)

    def _setting(self, name: str) -> Any:
        elsewhere = {
            "generator": self._noise._source,
            "secure_noise": self._noise.secure,
            "num_samples": self.ledger.num_samples,
        }
        return elsewhere[name] if name in elsewhere else super()._setting(name)
