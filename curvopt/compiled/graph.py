"""A captured function as the graphs of whole steps, one for each thing that a step may do."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from curvopt.compiled.capture import source_of
from curvopt.compiled.tracing import (
    CHANGES,
    FILLED,
    Failed,
    KnownTape,
    Program,
    Proof,
    Sign,
    Unsuited,
    check_compiled,
    check_plan,
    kept_randomness,
    loss_of,
    outline,
    said,
    share,
    storage_of,
    without_onednn,
)
from curvopt.compiled.updates import Moved, Traced, Update
from curvopt.engine.computation import Computation
from curvopt.errors import CurvoptError
from curvopt.looks import not_looking
from curvopt.losses.base import random_signs, signs_from
from curvopt.optim.lead import put
from curvopt.recording.tape import Tape

# In the names of what modules hold.
_OF_MODULE = re.compile(r"\._(buffers|parameters)\[")


class Graph:
    """One captured graph of the user's function, and the steps that were compiled of it.

    Args:
        captured: the graph, as Dynamo has captured it: calls of torch functions.
        update: the step of the optimizer.
        compiler: makes a fast function of a graph of ops, given its inputs.
        told: called with the graph and what its step does, before the step.
    """

    def __init__(
        self,
        captured: GraphModule,
        update: Update,
        compiler: Any,
        told: Callable[[Graph, Hashable], None],
    ):
        self.captured, self.update, self.compiler, self.told = captured, update, compiler, told
        holders = [n for n in captured.graph.nodes if n.op == "placeholder"]
        names = [source_of(node) for node in holders]
        self._buffers: list[int] = [k for k, name in enumerate(names) if "_buffers[" in name]
        self._data = {k for k, name in enumerate(names) if not _OF_MODULE.search(name)}
        self._held: list[int] = []
        self.programs: dict[tuple[Hashable, ...], Program | Unsuited] = {}
        self.params: list[tuple[int, Tensor]] = []
        self.moving: list[Tensor] = []
        self._settings: Hashable = None
        self._changes = 0
        self.reached: tuple[int, ...] = ()
        self.owned: list[int] = []

    def _begin(self, args: Sequence[Any], own: set[int]) -> None:
        """Learn which arguments are the optimizer's parameters."""
        if any(not isinstance(a, Tensor) for a in args):
            raise Unsuited("the captured function takes numbers that change")
        trained = [(k, a) for k, a in enumerate(args) if a.requires_grad]
        self.params = [(k, a) for k, a in trained if id(a) in own]
        others = [a for _, a in trained if id(a) not in own]
        # A batch that its model keeps in a buffer is data all the same.
        rest = {storage_of(a) for k, a in enumerate(args) if k in self._data}
        self._held = [k for k in self._buffers if storage_of(args[k]) not in rest]
        found = self._gradients([*map(self._copied, enumerate(args))], others)
        reached = [k for k, grad in enumerate(found) if grad is not None]
        ours = len(self.params) > max(reached, default=-1)
        if not ours or not all(isinstance(a, nn.Parameter) for a in others):
            raise Unsuited("a tensor that is not the optimizer's gets a gradient as well")
        self.reached = tuple(reached)
        self.moving = [self.params[k][1] for k in self.reached]

    def _copied(self, given: tuple[int, Any]) -> Any:
        """An argument, or a copy of one that a pass may change."""
        k, value = given
        if any(k == at for at, _ in self.params) or isinstance(value, nn.Parameter):
            return value
        return value.detach().clone()

    def _gradients(self, call: Sequence[Any], more: Sequence[Any] = ()) -> Sequence[Tensor | None]:
        """Gradients of a pass with values, in the parameters and more."""
        with kept_randomness(call[0].device), torch.enable_grad():
            try:
                outputs = self.captured(*call)
            except Exception as error:  # of a wrong index, say: an eager step fails as well
                raise Unsuited(said(error), asked=True) from error
            wanted = [*(p for _, p in self.params), *more]
            return torch.autograd.grad(loss_of(outputs), wanted, allow_unused=True)

    def check(self, args: Sequence[Any]) -> list[Tensor]:
        """The parameters that take part, which must be those of the optimizer still.

        Raises:
            Unsuited: they are not.
        """
        owned = [id(p) for p in self.update.opt._parameters()]
        if owned != self.owned:  # also when a group was added
            self.programs.clear()
            self.owned.clear()
            self._begin(args, set(owned))
            self.owned = owned
        for k, p in self.params:
            if args[k] is not p:
                raise Unsuited("a parameter of the model was replaced by another tensor")
            if not p.requires_grad:
                raise Unsuited
        return self.moving

    # -- a pass with values -----------------------------------------------------------------------

    def _proven(self, args: Sequence[Any], mode: Hashable) -> Proof:
        """Go through the pass as a step that is not compiled would, and change nothing."""
        update, opt = self.update, self.update.opt
        at = dict(self.params)
        call = [*map(self._copied, enumerate(args))]
        versions = [a._version for a in call]
        quantities, signs = update.quantities(mode), list[Sign]()

        def drawn(like: Tensor, shape: tuple[int, ...], generator: Any) -> Tensor:
            signs.append(Sign(shape, like.detach().new_empty(())))
            return torch.ones(shape, dtype=like.dtype, device=like.device)

        names = {p: name for name, p in opt._named()}
        tape = Tape([(names[p], p) for _, p in self.params], batch_size=opt.batch_size)
        tape.views = getattr(opt, "views", 1), getattr(opt, "view_order", "sample")
        held = [call[k] for k in self._held] if quantities else []
        held += [a for k, a in enumerate(call) if isinstance(a, nn.Parameter) and k not in at]
        share(tape, held)
        facts: Any = None
        with kept_randomness(args[0].device), signs_from(drawn):
            grads: list[Tensor | None]
            if quantities:
                with torch.enable_grad(), tape:
                    outputs = self.captured(*call)
                if update.filled and len(outputs) > 1:
                    raise Unsuited(FILLED)
                computation = self._computation(tape, loss_of(outputs))
                with torch.no_grad():
                    computation.prepare()
                    check_plan(computation)
                    grads, values = update.measure(computation, quantities)
                    facts = update.facts(values)
                plan, samples, sketch = computation.plan, computation.samples, outline(tape)
                if not samples:
                    raise Unsuited  # an empty batch
            else:
                grads, plan, samples, sketch = [*self._gradients(call)], None, 0, []
        if tuple(k for k, grad in enumerate(grads) if grad is not None) != self.reached:
            raise Unsuited("which parameters take part depends on values")
        changed = frozenset(k for k, a in enumerate(call) if a._version != versions[k])
        if changed & at.keys():
            raise Unsuited("the function changes a parameter in place")
        if changed and update.private:
            raise Unsuited("the function changes a buffer or its arguments in place")
        return Proof(plan, sketch, signs, samples, changed, facts)

    def _computation(self, tape: Tape, loss: Tensor) -> Computation:
        opt = self.update.opt
        return Computation(
            tape, loss, opt.reduction, finite=False, declared=self.update.private, penalties=True
        )

    # -- the graph --------------------------------------------------------------------------------

    def program(self, args: Sequence[Any], mode: Hashable, state: list[Tensor]) -> Program:
        """The compiled step, made if there is none yet."""
        autocast = torch.is_autocast_enabled(args[0].device.type)
        # Of whatever was loaded.
        kinds = tuple((value.dtype, value.stride()) for value in state)
        key = mode, self._steady(), autocast, kinds
        if key not in self.programs:
            self._gradients([*map(self._copied, enumerate(args))])  # else it fails for good
            try:
                self.programs[key] = self._build(args, mode, state)
            except Unsuited as unsuited:
                self.programs[key] = unsuited
            except CurvoptError as error:
                self.programs[key] = Unsuited(str(error), asked=True)
            except Exception as error:  # whatever it is, an eager step does not need the graph
                self.programs[key] = Unsuited(said(error))
        found = self.programs[key]
        if isinstance(found, Unsuited):
            raise found
        return found

    def _steady(self) -> Hashable:
        """The settings, once two steps in a row have the same.

        Raises:
            Unsuited: they have not, as under a schedule of the momentum.
        """
        settings, before = self.update.settings(), self._settings
        self._settings = settings
        if before in (None, settings) or any(key[1] == settings for key in self.programs):
            self._changes = 0
            return settings
        self._changes += 1
        often = "settings of the optimizer change from step to step"
        raise Unsuited(often if self._changes > CHANGES else "", asked=True)

    def _build(self, args: Sequence[Any], mode: Hashable, state: list[Tensor]) -> Program:
        proof = self._proven(args, mode)
        params = self.moving
        groups = self._groups(params)
        given = self._inputs(args, proof, mode, params, groups, state, drawn=False)
        counts = [len(part) for part in given]
        number = 0

        def step(*flat: Tensor) -> list[Tensor]:
            nonlocal number
            rest = iter(flat)
            parts = [[next(rest) for _ in range(count)] for count in counts]
            result, number = self._traced(proof, mode, groups, *parts)
            return result

        flat = [a.detach() for part in given for a in part]
        # One op for a whole recurrent layer is none that Inductor can compile with its gradient.
        with torch.no_grad(), kept_randomness(args[0].device), without_onednn():
            graph = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*flat)
        with torch.no_grad(), kept_randomness(args[0].device):
            graph.graph.eliminate_dead_code()
            graph.recompile()
            run = self.compiler(graph, flat)
            check_compiled(graph, run, flat)
        return Program(run, proof, number)

    def _groups(self, params: Sequence[Tensor]) -> list[dict[str, Any]]:
        groups = self.update.opt.param_groups
        of = {p: group for group in groups[1:] for p in group["params"]}
        return [of.get(p, groups[0]) for p in params]

    def _inputs(
        self,
        args: Sequence[Any],
        proof: Proof,
        mode: Hashable,
        params: list[Tensor],
        groups: Sequence[dict[str, Any]],
        state: list[Tensor],
        *,
        drawn: bool = True,
    ) -> list[list[Tensor]]:
        """All that goes into a graph: arguments, state, numbers, signs, draws."""
        update = self.update
        rows = update.numbers(mode, params, groups, proof.samples)
        numbers = [*put(rows, params[0].new_empty((), dtype=torch.float64))]
        if not drawn:  # what has the same shapes will do
            signs = [sign.like.new_ones(sign.shape) for sign in proof.signs]
            return [[*args], state, numbers, signs, update.blanks(params)]
        generator = update.opt.generator
        signs = [random_signs(sign.like, sign.shape, generator) for sign in proof.signs]
        return [[*args], state, numbers, signs, update.draw(params)]

    def _traced(
        self,
        proof: Proof,
        mode: Hashable,
        groups: Sequence[dict[str, Any]],
        args: list[Tensor],
        state: list[Tensor],
        numbers: list[Tensor],
        signs: list[Tensor],
        drawn: list[Tensor],
    ) -> tuple[list[Tensor], int]:
        """One step on tensors without values: its outputs, and how many are the function's own."""
        update, at = self.update, {k: n for n, (k, _) in enumerate(self.params)}
        call = [
            a.detach().requires_grad_() if k in at else a.clone() if k in proof.changed else a
            for k, a in enumerate(args)
        ]
        leaves = [call[k] for k in at]
        quantities = update.quantities(mode)
        names = {p: name for name, p in update.opt._named()}
        rest = iter(signs)
        with not_looking() as conditions, signs_from(lambda *_: next(rest)):
            if quantities:
                tape = KnownTape(
                    [(names[p], leaf) for (_, p), leaf in zip(self.params, leaves, strict=True)],
                    proof.plan,
                )
                share(tape, [call[k] for k in self._held])
                with torch.enable_grad(), tape:
                    outputs = self.captured(*call)
                loss = loss_of(outputs)
                computation = self._computation(tape, loss)
                with torch.no_grad():
                    grads, values = update.measure(computation, quantities, numbers, drawn)
                if outline(tape) != proof.outline:
                    raise Unsuited("a pass without values is recorded in another way")
            else:
                with torch.enable_grad():
                    outputs = self.captured(*call)
                    loss, values = loss_of(outputs), {}
                    grads = [*torch.autograd.grad(loss, leaves, allow_unused=True)]
            found = {k: grad for k, grad in enumerate(grads) if grad is not None}
            if tuple(found) != self.reached:
                raise Unsuited("a pass without values reaches other parameters")
            moving = [leaves[k] for k in found]
            with torch.no_grad():
                traced = Traced(
                    moving, [*found.values()], groups, values, quantities,
                    proof.samples, loss.detach(), state, numbers, drawn, mode,
                )  # fmt: skip
                moved = update.move(traced)
        return self._ended(args, call, at, proof, conditions.any(), outputs, moved)

    def _ended(
        self,
        args: list[Tensor],
        call: list[Tensor],
        at: dict[int, int],
        proof: Proof,
        bad: Tensor | None,
        outputs: Sequence[Any],
        moved: Moved,
    ) -> tuple[list[Tensor], int]:
        """Write everything, if the step has not failed."""
        loss = outputs[0].detach()
        with torch.no_grad():
            if self.update.finite_loss:
                finite = ~loss.reshape(()).isfinite()
                bad = finite if bad is None else bad | finite
            if bad is None:
                bad = torch.zeros((), dtype=torch.bool, device=loss.device)
            targets = {id(call[k]): args[k] for k in at}
            for target, value in moved.writes:
                own = targets.get(id(target), target)
                own.copy_(torch.where(bad, own, value))
            for k in proof.changed:
                args[k].copy_(torch.where(bad, args[k], call[k]))
        tensors = [
            moved.loss if k == 0 and moved.loss is not None else o.detach()
            for k, o in enumerate(outputs)
        ]
        return [bad, *tensors, *moved.grads, *moved.seen], len(tensors)

    # -- running ----------------------------------------------------------------------------------

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Take a step.

        Raises:
            Unsuited: it has to be taken eagerly; nothing was changed.
        """
        update = self.update
        moving = self.check(args)
        mode = update.mode(moving)
        if mode is None:
            raise Unsuited
        self.told(self, mode)
        groups = self._groups(moving)
        state = update.tensors(mode, moving, groups)
        program = self.program(args, mode, state)
        proof = program.proof
        update.begin(proof.samples)
        parts = self._inputs(args, proof, mode, moving, groups, state)
        inputs = [value for part in parts for value in part]
        try:
            with torch.no_grad():
                result = program.run(*inputs)
            failed = bool(result[0])
        except BaseException as error:
            update.interrupted()
            if isinstance(error, Exception):  # a wrong index, say: the function's words are clearer
                with torch.no_grad(), kept_randomness(args[0].device):
                    self.captured(*map(self._copied, enumerate(args)))
            raise
        if failed:  # eagerly, it says why; or does what a graph cannot
            raise Failed
        end = 1 + program.outputs
        for p, grad in zip(moving, result[end:], strict=False):
            p.grad = grad
        if len(moving) < len(own := [*update.opt._parameters()]):
            moved = set(map(id, moving))
            for p in own:
                p.grad = p.grad if id(p) in moved else None
        update.done(mode, moving, groups, proof, result[end + len(moving) :])
        return result[1:end]
