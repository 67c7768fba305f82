"""Steps along the polar factor of the batch's gradient, at a rate that finds itself."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from curvopt.dtypes import at_least_float32
from curvopt.engine.computation import Computation
from curvopt.errors import Coupled, CurvoptError
from curvopt.optim import stats
from curvopt.optim.diag_ggn import Move, Plan
from curvopt.optim.joined import Backward
from curvopt.optim.lead import seen
from curvopt.optim.polar_factor import by_factors
from curvopt.optim.polar_step import MatrixPlan, Rows, check_dense, gathered, rows_of
from curvopt.optim.schedule import Scheduled
from curvopt.optim.state import sides
from curvopt.quantities import DiagGGNMC, Quantity
from curvopt.quantities.base import Context
from curvopt.quantities.raw import Structures
from curvopt.recording.tape import Tape
from curvopt.structures import Conv, Lookup, Outer, Own, Permuted, Pulled, Shift, Structure, Total

# Steps from one look at the number of rows to the next, while no matrix is stepped by its factors.
LOOK = 64
# Ops whose parameters of two axes are matrices, without groups.
PRODUCTS = frozenset(
    "linear matmul mm addmm Tensor.__matmul__ Tensor.__rmatmul__ t T mT conv1d conv2d conv3d "
    "conv_transpose1d conv_transpose2d conv_transpose3d".split()
)


class PolarOptimizer(Scheduled):
    r"""Steps along the polar factor of the batch's gradient, at a rate that finds itself.

    With the gradient G of a matrix ``[O, I]``, :math:`s_1` its largest singular value:

    .. math::
        u &= G \, (G^T G + \epsilon^2 s_1^2)^{-1/2}, \qquad
        m \leftarrow \mu m + (1 - \mu) u \\
        \gamma &\leftarrow \gamma \exp \Bigl(\kappa
            \Bigl(\frac{r - \rho}{1 - \rho} - \tau\Bigr)\Bigr), \qquad
        r = \|\hat s\|^2 / \hat e \\
        \theta &\leftarrow \theta - \mathrm{lr} \,
            (\gamma \sqrt{\max(O, I)} \, \hat m + \lambda \theta)

    where the hats are bias corrections, s and e are averages of S and :math:`\|S\|^2`, S a fixed
    random projection of G to 24 x 24 numbers, :math:`\rho` is r under noise alone, and gamma, one
    for each matrix, starts at 1 and is 100 at most. Why each part is there:

    * u has the directions of G, each at the same length but for the smallest. Where a few
      directions dominate the gradient (autoencoders, deep or badly scaled networks), SGD and all
      methods that scale elements make progress along them alone.
    * **It is the factor of the batch, not of the momentum** (Muon's). The gradient of a layer is
      :math:`L^T R`, with as many rows in L (cotangents) and R (inputs) as the batch has, and the
      engine holds both. So a factor takes work of the size of the batch where a layer is wide;
      momentum has full rank. Otherwise it is had from the smaller Gram matrix. Both ways give the
      same numbers: which is taken is a matter of cost. Rows whose product is not what ``p.grad``
      holds (a penalty in the loss, a clipped element) are left alone until step 65, 129, ...
    * :math:`\|\hat m\| \le 1`, so lr times :math:`\sqrt{\max(O, I)}` bounds the spectral norm of
      a step at gamma = 1, and lr about its root mean square. m shrinks by itself where batches
      disagree.
    * The rate finds itself as `DiagGGNOptimizer`'s does. It grows more slowly, and shrinks where
      agreement is slight: all directions of a step are long.

    Convolutions are matrices ``[O, C k k]``; vectors (biases, scales of norms) matrices of one
    column, whose factor is the normalized gradient. Tables (embeddings, tied or not, and
    parameters that are added or act by groups) take the steps of `DiagGGNOptimizer`, bounded to
    root mean square lr gamma; the curvature is measured for them alone, and only if there are any.

    When not to use it: where a step is a matter of microseconds; with layers both wide and fed by
    more rows (tokens) than they are wide, above some 500, whose factor costs as much as Muon's (on
    every process, also where layers are sharded). Where samples are coupled, by batch norm in
    training mode or a contrastive loss, there are no rows, and all factors are had from Gram
    matrices; with tables such passes are refused.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups.
        lr: about the root mean square of a step before the rate adapts. Default 5e-3: of what was
            tried, 3e-3 ends a little lower on an autoencoder, 1.2e-2 on a residual net and a GRU.
            A schedule multiplies the adapted rate.
        momentum: :math:`\mu`. Default 0.9. Without momentum the rate does not adapt.
        eps: :math:`\epsilon`, the damping in units of the largest singular value: directions below
            it are noise. Default 1e-3; 3e-2 is much worse on an autoencoder.
        adaptation: :math:`\kappa`, how fast the rate adapts. Default 0.1; 0 keeps it as it is.
        margin: :math:`\tau`, the agreement of gradients below which the rate shrinks. Default 0.05;
            0 with a schedule that lets the rate fall at the end, which is better than either alone.
        weight_decay: :math:`\lambda`, decoupled as in AdamW. Default 0.
        damping: of tables, as in `DiagGGNOptimizer`. Default 0.1.
        curvature_decay: of tables. Default 0.95.
        curvature_every: of tables: steps from one measurement of the curvature to the next.
            Default 10.
        generator: source of the measurement's signs; torch's global one by default.
        maximize: ascend instead of descend.
        process_group: the processes of a step, where nothing wraps the model: their gradients are
            averaged in `step`. Default: those of the wrapper (``DistributedDataParallel``,
            ``fully_shard``).
        batch_size: number of samples, where the data flow leaves two readings; checked against it.
        reduction: ``"mean"`` or ``"sum"``: what a sample's own loss is where a sum is scaled by
            something that may be a count: N times its part of the loss, or its part.

    Attributes:
        failed: how often a batch's rows had no Cholesky factor, so that the Gram matrix was taken.

    Raises:
        ValueError: a setting is out of range.
        CurvoptError: in `step`: a gradient is not finite, or sparse; the rows cannot be
            found; parameters, gradients and state are as before.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> opt = curvopt.PolarOptimizer(model.parameters())
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y))

    Note:
        State is one number per parameter, and three for tables. Several backward passes before a
        step are one batch, and so are the batches of several processes: the factor is that of the
        gradient that the wrapper has averaged. The rows of all processes are gathered, n (O + I)
        numbers, where they are still few. Under ``fully_shard`` the gradient of one matrix at a
        time is gathered as well, and its momentum is a shard.

        Measured with the defaults, one thread: a deep autoencoder (784-1000-500-250-30 and back,
        tanh) is through its plateau and below 87 after 100 steps and 6.1 s (tuned Muon 80 steps and
        8.2 s; the others never), a residual net at 93.8 % after 60 steps (SOAP 60, Muon 140).
        A step costs 1.1 to 1.5 steps of SGD with momentum on convolutional and language models, 2.4
        on the wide layers of MLP and autoencoder, more on tiny nets. Not measured on a GPU.

    References:
        Jordan et al. 2024, "Muon", https://kellerjordan.github.io/posts/muon; Bernstein and
        Newhouse 2024, "Old optimizer, new norm", arXiv 2409.20325; Lau et al. 2025, "PolarGrad",
        arXiv 2505.21799 (whose polar-first variant also averages factors). Departures: the factor
        is damped, and had in the space of the samples; the step is scaled by
        :math:`\sqrt{\max(O, I)}` in place of the nuclear norm; the rate finds itself.
    """

    saved: ClassVar[tuple[str, ...]] = ("steps", "waiting", "failed")
    takes_shards = True
    failed = 0

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 5e-3,
        momentum: float = 0.9,
        *,
        eps: float = 1e-3,
        adaptation: float = 0.1,
        margin: float = 0.05,
        weight_decay: float = 0.0,
        damping: float = 0.1,
        curvature_decay: float = 0.95,
        curvature_every: int = 10,
        generator: Generator | None = None,
        maximize: bool = False,
        process_group: Any = None,
        batch_size: int | None = None,
        reduction: str | None = None,
    ):
        if curvature_every < 1:
            raise ValueError(f"Invalid curvature_every: {curvature_every}")
        defaults = dict(
            lr=lr, momentum=momentum, eps=eps, adaptation=adaptation, margin=margin,
            weight_decay=weight_decay, damping=damping, curvature_decay=curvature_decay,
            maximize=maximize,
        )  # fmt: skip
        super().__init__(
            params,
            defaults,
            batch_size=batch_size,
            reduction=reduction,
            generator=generator,
            process_group=process_group,
        )
        self.curvature_every = curvature_every

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        for key in ("momentum", "curvature_decay"):
            if not 0 <= group[key] < 1:
                raise ValueError(f"Invalid {key}: {group[key]}")
        if not 0 < group["eps"] < 1:
            raise ValueError(f"Invalid eps: {group['eps']}")
        for key in ("damping", "adaptation"):
            if not 0 <= group[key] < float("inf"):
                raise ValueError(f"Invalid {key}: {group[key]}")
        if not -1 <= group["margin"] <= 1:
            raise ValueError(f"Invalid margin: {group['margin']}")

    # -- what a step measures ---------------------------------------------------------------------

    joins_passes = True

    def _looks(self) -> bool:
        """Whether all parameters are recorded, to see what they are and how many rows there are."""
        return self.waiting or self.steps % LOOK == 0

    def _measured(self) -> tuple[list[Tensor], list[Tensor]]:
        """Tables whose curvature is due, and matrices that are stepped by their rows."""
        tables, factored = [], []
        for p, state in self.state.items():
            if not p.requires_grad:
                continue
            if "curvature" in state:
                if self._due(p):
                    tables.append(p)
            elif "rows" in state and by_factors(state["rows"], *sides(p)):
                factored.append(p)
        return tables, factored

    def _measures(self) -> bool:
        return self._looks() or any(self._measured())

    def _wanted(self) -> list[Quantity]:
        if self._looks():
            return [Structures()]
        tables, factored = self._measured()
        wanted: list[Quantity] = [self._sketch()] if tables else []
        return [*wanted, Structures()] if factored else wanted

    def _sketch(self) -> Diagonal:
        return Diagonal(generator=self._own_draws(self.generator))

    def _tape(self) -> Tape:
        """Records the parameters of which something is wanted: the others cost nothing."""
        if self._looks():
            return super()._tape()
        seen = self._wrappers.shards.of
        wanted = {id(seen(p)) for part in self._measured() for p in part}
        named = [(name, p) for name, p in self._tracked() if id(p) in wanted]
        tape = Tape(named, batch_size=self.batch_size)
        # Parameters also where no function is seen to use them: in scripted code.
        tape.record.silent += [p for _, p in self._tracked() if id(p) not in wanted]
        return tape

    def _accumulate(
        self, computation: Computation, quantities: list[Quantity], backward: Backward
    ) -> None:
        values: dict[str, Any] = {}
        owner = self._wrappers.shards.owner
        tracked = [owner(p) for p in computation.tape.params]
        computation.covered_only = True  # a matrix is stepped by its gradient where rows are dear
        if not self._finds_samples(computation):
            backward()
            self.collected.append({"tables": dict.fromkeys(tracked, False)})
            return
        sketches = [quantity for quantity in quantities if isinstance(quantity, Diagonal)]
        if self._looks():
            kinds = {owner(p): is_table(p, s) for p, s in computation.outline().items()}
            values["tables"] = dict.fromkeys(tracked, False) | kinds
            if any(kinds.values()):
                sketches = [Diagonal(generator=self._own_draws(self.generator))]
        values |= computation.run(sketches) if sketches else {}
        if isinstance(quantities[-1], Structures):
            with computation.watching(quantities[-1:], values):
                backward(computation.derives)
            structures = values.pop(Structures.field)
            values["rows"] = {owner(p): rows_of(s) for p, s in structures.items() if p.ndim == 2}
        else:
            backward()
        self.collected.append(values)

    def _finds_samples(self, computation: Computation) -> bool:
        """Whether there are rows: not where samples are coupled, which matrices can do without.

        Raises:
            CurvoptError: they are coupled, and a parameter may be a table.
        """
        try:
            computation.prepare()
        except CurvoptError as error:
            coupled = isinstance(error, Coupled) or isinstance(error.__cause__, Coupled)
            if not coupled or may_be_tables(computation.tape):
                raise
            computation.leave()
            return False
        return True

    def _rescale(self, inverse: float) -> None:
        """The curvature's; to rows, a common factor is nothing."""
        field, passes = Diagonal.field, [*self.collected]
        self.collected[:] = [
            {**v, field: {p: d * inverse for p, d in v[field].items()}} if field in v else v
            for v in passes
        ]

    def _join(self) -> None:
        """Curvature is the mean of the processes', rows are put one after the other.

        A process whose samples are coupled has neither, and takes part all the same.
        """
        params, count = [*self._parameters()], self._ranks.place[1]
        for values in self.collected:
            tables = values.setdefault("tables", {})
            mine = [index for index, p in enumerate(params) if tables.get(p)]
            found = [params[index] for index in self._ranks.union(mine, len(params))]
            tables |= dict.fromkeys(found, True)
            totals = self._sums(values.get(Diagonal.field, {}))
            if totals:
                means = {p: total.div_(count) for p, total in totals.items()}
                values[Diagonal.field] = self._shards(means)
            values["rows"] = gathered(values.get("rows", {}), params, self._ranks)

    def _stats(self) -> stats.Stats:
        return stats.polar(self.param_groups, self.state)

    # -- the step ---------------------------------------------------------------------------------

    def _update(self) -> None:
        unmeasured = self._still_unmeasured()
        plans: list[Plan | MatrixPlan] = []
        for group in self.param_groups:
            tables, matrices = [], []
            for p in group["params"]:
                if p.grad is None or not p.numel():
                    continue
                check_dense(p, self._name)
                state = seen(self.state[p]) if p in self.state else self._first_state(p, group)
                (unmeasured.discard if state else unmeasured.add)(p)
                if not state:
                    continue  # it takes part for the first time: looked at next
                if "curvature" in state:
                    due = p not in self.state or self._due(p)
                    found = self._found(p, Diagonal.field) if due else []
                    tables.append(Move(p, p.grad, state, found, self._name))
                else:
                    rows = Rows.joined([v.get("rows", {}).get(p) for v in self.collected])
                    if self._looks() and rows is None and "rows" in state:
                        state["rows"] = float("inf")  # samples are coupled by now
                    matrices.append((p, p.grad, state, rows))
            plans.append(Plan(tables, {**group, "max_step": 1.0}))
            plans.append(MatrixPlan(matrices, group, self._name))
        self._wait_for(unmeasured)
        for plan in plans:  # nothing has changed so far
            plan.carry_out(self.state)
            self.failed += plan.failed if isinstance(plan, MatrixPlan) else 0

    def _found(self, p: Tensor, field: str) -> list[Any]:
        """What each pass found of a parameter."""
        return [values[field][p] for values in self.collected if p in values.get(field, ())]

    def _begun(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        raise CurvoptError(
            "what PolarOptimizer keeps of a parameter depends on the layers that use it, so that "
            "there is no state before the first step: take a step before a state is saved or "
            "loaded by torch.distributed.checkpoint (loading overwrites what the step did)"
        )

    def _first_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter that takes its first step; {} as long as its kind is unknown."""
        curvature, tables = self._found(p, Diagonal.field), self._found(p, "tables")
        # Contiguous, so that it is a matrix without being copied.
        dtype = at_least_float32(p.dtype)
        m = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        state: dict[str, Any] = {"step": 0, "momentum_buffer": m}
        if curvature:
            state |= {"weight": 0.0, "curvature": m.clone()}
        elif p.ndim > 1 and (any(tables) or not tables):
            return {}
        # All that is to come: what a checkpoint is read into has to be there.
        if group["momentum"] and group["adaptation"]:
            state |= dict.fromkeys(("energy", "energy_weight", "log_rate"), 0.0)
        return state


class Diagonal(DiagGGNMC):
    """A sketch of the GGN's diagonal, of the parameters that are no matrices."""

    def reduce_all(  # noqa: D102 (as in the base class)
        self, structures: dict[Tensor, Structure], context: Context
    ) -> dict[Tensor, Any]:
        return {p: self.reduce(s, context) for p, s in structures.items() if is_table(p, s)}


def may_be_tables(tape: Tape) -> bool:
    """Whether parameters of two axes or more are used by ops that need not be a matrix's."""
    for call in tape.record.calls:
        roots = {root for value in call.inputs.values() for root in value.roots}
        if any(tape.by_id[root].ndim > 1 for root in roots) and (
            call.op not in PRODUCTS or call.arguments.get("groups", 1) != 1
        ):
            return True
    return False


def is_table(p: Tensor, structure: Structure) -> bool:
    """Whether a parameter of two axes or more is a table, not a matrix that acts on inputs."""
    if p.ndim < 2:
        return False
    if isinstance(structure, (Pulled, Permuted)):
        return is_table(p, structure.inner)
    if isinstance(structure, Total):
        return any(is_table(p, part) for part in structure.parts)
    if isinstance(structure, (Outer, Conv)):
        return structure.groups > 1
    return isinstance(structure, (Lookup, Shift, Own))
