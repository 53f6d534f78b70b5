"""Optimizers of the rows that a batch looks up, and of no others.

    torch.optim     backward writes a gradient as long as the arena, step() reads all of it
    immediate       backward steps the rows of the batch, and nothing else exists or moves
    deferred        backward collects the gradients of these rows, step() steps them

An optimizer built on a module is *attached* to it: from then on it steps the module's rows. The
chain and the rest of the model have gradients as always and are stepped by any ``torch.optim``
optimizer.

**Immediate**, the default and the fastest: ``loss.backward()`` updates the rows that were looked
up, in place, and the gradient of the Parameter that holds them (``arena.storage``; with one size
``weight``) stays ``None``. The other optimizer may be given ``module.parameters()`` as a whole: it
skips the rows, which have no gradient.

    rows, dense = optim.Adam(embedding), torch.optim.Adam(model.parameters())
    loss.backward()     # steps the rows
    dense.step()        # steps everything else
    rows.step()         # brings changed settings to the device; see FusedOptimizer.step

Because a row steps when its gradient is known, whatever comes between backward and ``step`` in
other training loops does not apply to the rows. Every pass back through the lookup steps its rows,
also ``torch.autograd.grad(loss, [chain])`` and ``backward(inputs=[chain])``, which compute no
gradient of the rows. Two lookups in one module before a backward pass raise there, for the first to
go backward moves the rows under the other: look up all ids of a step in one call.

**Deferred** (``deferred=True``): that gradient is an ``ops.row_gradient.RowGradient``, which lists
the rows of the batch and takes the place of a dense one. Gradients of several lookups and several
backward passes add up; ``GradScaler``, ``clip_grad_norm_`` and ``clip_grad_value_`` over
``model.parameters()``, ``zero_grad``, closures and hooks work as with ``torch.optim``, and the norm
that ``clip_grad_norm_`` or ``get_total_norm`` returns is that of the dense gradient. One step takes
a row's sum of gradients; on a CPU it gives the bits of the immediate mode after one backward pass
of one lookup. Another optimizer that would step the rows as well is refused: give it all parameters
but ``arena.storage`` (``weight``).

    rows = optim.Adam(embedding, deferred=True)
    dense = torch.optim.Adam(p for p in model.parameters() if p is not embedding.arena.parameter)
    for part in batch:
        scaler.scale(loss(part)).backward()
    for optimizer in (rows, dense):
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in (rows, dense):
        if norm.isfinite():
            scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()

The scaler judges each optimizer by the gradients that it had at ``unscale_``. Clipping by a norm
that is NaN makes all gradients NaN afterwards, those of the other optimizer too: hence the ``if``,
as with any two optimizers.

A row that is resized between backward and ``step`` has no gradient, as it has no state. A dense or
sparse gradient of the Parameter, as of a second derivative or of a tied layer, steps every row.

Memory picture, per row of size d: SGD nothing, Adagrad ``4 d`` bytes, row-wise Adagrad 4, Adam
``8 d + 4``, row-wise Adam ``4 d + 8``, in fp32 whatever the rows' own dtype (fp64 for fp64 rows).
The state lies in the arena's layout or holds one number per id; it grows and moves with the rows,
and is a fresh row's where a row is resized (``storage.followers``). The rules themselves are in
``ops.update``.

Weight decay and bounds on a row's summed gradient are settings of the optimizers. Both work on the
rows of the batch alone: a row decays in the steps that meet it and in no other, as in FBGEMM, where
the dense optimizers of torch let every row decay in every step.

The ``native`` and ``torch`` backends check ids before any row steps and before Adam's clock moves.
The ``reference`` backend never fuses, and its gradients are dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .module import ResizableEmbedding
from .ops.backend import is_capturing, on_large_pages
from .ops.chain import compute_dtype
from .ops.row_gradient import RowGradient, step_rows
from .ops.update import Update, is_shaped, rule_numbers
from .storage.arena import Arena
from .storage.table import Table

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "FusedOptimizer"]

_LATER = ("rowwise", "weight_decay", "clip_value", "clip_row_norm")
"""Settings that checkpoints may lack."""

_STRIDED = (
    "a fused optimizer steps rows that lie one behind the other, and those of weight do not: use "
    "an optimizer of torch.optim, or a weight that is contiguous"
)


class FusedOptimizer(torch.optim.Optimizer):
    """What the optimizers of this file share: attaching, the clock, and exact checkpoints.

    ``self.state[arena.parameter]`` holds the state under ``torch.optim``'s names; there is one
    parameter group, whose ``lr`` and ``betas`` any scheduler of ``torch.optim.lr_scheduler`` may
    change, and a training loop ``weight_decay``, ``clip_value`` and ``clip_row_norm`` too.

    A copy (``copy.deepcopy``, pickle) of a module has no fused optimizer, and a copy of the
    optimizer is attached to nothing: build a new one and load the ``state_dict``.
    """

    decoupled = False
    """Whether ``weight_decay`` shrinks the rows; else it is a penalty in their gradient."""

    @torch.inference_mode(False)
    def __init__(
        self,
        modules: ResizableEmbedding | Iterable[ResizableEmbedding],
        defaults: dict[str, Any],
        deferred: bool = False,
    ) -> None:
        _check_at_least_zero(defaults["weight_decay"], "weight_decay value")
        for name in ("clip_value", "clip_row_norm"):
            if defaults[name] is not None and not defaults[name] > 0.0:
                raise ValueError(f"Invalid {name}: {defaults[name]}")
        found = _check_modules(modules)
        arenas = [module.arena for module in found]
        super().__init__([arena.parameter for arena in arenas], defaults)
        self.deferred = deferred
        self._modules, self._arenas = found, arenas
        self._numbers: dict[Tensor, Tensor] = {}
        self._shown = self._present()
        for arena in arenas:
            parameter = arena.parameter
            numbers = torch.tensor(self._shown, dtype=torch.float64, device=parameter.device)
            self._numbers[parameter] = numbers
            state = self._fresh_state(arena)
            if state:
                self.state[parameter] = state
        for arena in arenas:
            arena.attach(self)

    @property
    def rule(self) -> str:
        """One of ``ops.update.RULES``."""
        raise NotImplementedError

    @property
    def state_per_element(self) -> dict[str, float]:
        """State of the Parameter's shape: its names and what it starts as."""
        return {}

    @property
    def state_per_id(self) -> dict[str, float]:
        """State ``[num_rows]``: its names and what it starts as."""
        return {}

    def _fresh_state(self, arena: Arena | Table) -> dict[str, Tensor]:
        rows = arena.parameter
        dtype = compute_dtype(rows.dtype)
        state = {
            name: on_large_pages(torch.full_like(rows, fresh, dtype=dtype, requires_grad=False))
            for name, fresh in self.state_per_element.items()
        }
        for name, fresh in self.state_per_id.items():
            state[name] = torch.full((arena.num_rows,), fresh, dtype=dtype, device=rows.device)
        return state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused but for the one group of construction: build another optimizer instead."""
        if self.param_groups:
            raise TypeError(f"{type(self).__name__} has one parameter group: build another one")
        super().add_param_group(param_group)

    def detach(self) -> None:
        """Leave the modules: their backward writes gradients again, and the state stays as it is.

        The state follows the rows no longer. Deleting the optimizer does the same, as soon as
        Python collects it (a scheduler built on it makes a reference cycle).
        """
        for arena in self._arenas:
            arena.detach(self)
        self._modules, self._arenas = [], []

    def begin_step(self, parameter: Tensor) -> Update:
        """What a step does to a row, for whoever applies it, and counts the step by it.

        Works on the device alone, and can be captured in a CUDA graph.
        """
        if not self._arenas:
            raise RuntimeError("the fused optimizer was detached between forward and backward")
        numbers = self._numbers.get(parameter)
        if numbers is None or numbers.device != parameter.device:
            raise RuntimeError(
                "the rows were replaced or moved to another device after the fused optimizer was "
                "built: build the optimizer last"
            )
        if not parameter.is_contiguous():
            raise RuntimeError(_STRIDED)
        state = self.state.get(parameter, {})
        elements = [state[name] for name in self.state_per_element]
        per_id = [state[name] for name in self.state_per_id]
        if any(held.shape != parameter.shape for held in elements) or (
            parameter.dim() == 2 and any(len(held) != len(parameter) for held in per_id)
        ):
            raise RuntimeError(
                f"weight is {list(parameter.shape)} now, which the fused optimizer was not built "
                "for: call its detach() and build another one"
            )
        last_step = state.get("last_step")
        # In state_per_id the sum comes first.
        row_sums = per_id[0] if per_id and per_id[0] is not last_step else None
        return Update(
            self.rule,
            numbers,
            state=tuple(held.view(-1) for held in elements),
            row_sums=row_sums,
            last_step=last_step,
            clock=state.get("clock"),
            shaped=is_shaped(self._bring()),
        )

    def _present(self) -> tuple[float, ...]:
        """The parameter group's settings, as the kernels take them."""
        group = self.param_groups[0]
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        betas = float(beta1), float(beta2)
        decay = float(group["weight_decay"])
        value, norm = group["clip_value"], group["clip_row_norm"]
        return rule_numbers(
            float(group["lr"]),
            float(group.get("eps", 0.0)),
            betas,
            0.0 if self.decoupled else decay,
            decay if self.decoupled else 0.0,
            math.inf if value is None else float(value),
            math.inf if norm is None else float(norm),
        )

    def _bring(self) -> tuple[float, ...]:
        """Bring changed settings to the device, without waiting for it, and return them."""
        present = self._present()
        if present == self._shown:
            return present
        # A capture would record the numbers themselves, and every replay write them again.
        if any(is_capturing(numbers) for numbers in self._numbers.values()):
            return present
        for numbers in self._numbers.values():
            fresh = torch.tensor(
                present, dtype=torch.float64, device="cpu", pin_memory=numbers.is_cuda
            )
            numbers.copy_(fresh, non_blocking=True)
        self._shown = present
        return present

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Deferred: step the rows that have a gradient, each once. Else bring settings along.

        Without ``deferred`` backward stepped the rows, with the settings of its time. Only the
        replays of a captured CUDA graph need this call then, outside the graph, for changed
        settings (``lr``, ``betas``); one captured without decay and clipping goes on without.
        Schedulers expect it before their own ``step``, as with any optimizer.

        Args:
            closure: called with gradients enabled, as by ``torch.optim``; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.deferred:
            self._bring()
            return loss
        for module, arena in zip(self._modules, self._arenas, strict=True):
            parameter = arena.parameter
            if parameter.grad is None:
                continue
            update, layout = self.begin_step(parameter), arena.layout
            grad = RowGradient.of(parameter.grad, layout)
            step_rows(grad, parameter, layout, update, module.backend)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, bit for bit, into the present tensors.

        Load the module first: its arena takes the saved length, and this state with it.

        Raises:
            ValueError: state of another optimizer or of another shape; nothing is changed.
        """
        copies = list(self._matched(state_dict))
        # torch casts state to the rows' dtype: fp32 moments of 16-bit rows, and counters, too.
        super().load_state_dict({**state_dict, "state": {}})
        for own, saved, parameter, name in copies:
            own.copy_(saved)
            self.state[parameter][name] = own

    def _matched(self, state_dict: dict[str, Any]) -> Iterable[tuple[Tensor, Tensor, Tensor, str]]:
        """``(own tensor, saved tensor, parameter, name)`` for everything in ``state``."""
        saved_params = [p for group in state_dict["param_groups"] for p in group["params"]]
        for parameter, key in zip(self.param_groups[0]["params"], saved_params, strict=False):
            own, saved = self.state.get(parameter, {}), state_dict["state"].get(key, {})
            shapes, saved_shapes = (
                {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
                for state in (own, saved)
            )
            if shapes != saved_shapes:
                raise ValueError(
                    f"loaded state {saved_shapes} does not fit {type(self).__name__}'s {shapes}; "
                    "load the module first"
                )
            for name, value in own.items():
                yield value, saved[name], parameter, name

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy is attached to nothing.
        for name, empty in (
            ("_modules", []),
            ("_arenas", []),
            ("_numbers", {}),
            ("_shown", ()),
            ("deferred", False),
        ):
            self.__dict__.setdefault(name, empty)
        # Of a checkpoint that is older than a setting.
        for group in self.param_groups:
            for name in _LATER:
                if name in self.defaults:
                    group.setdefault(name, self.defaults[name])


class SGD(FusedOptimizer):
    """``e <- e - lr g`` for every row of the batch.

    Args:
        modules: one :class:`ResizableEmbedding` or an iterable of them.
        lr: learning rate.
        weight_decay: L2 penalty, ``g <- g + weight_decay e``, in the steps that meet the row.
        clip_value: bounds every number of ``g``, a row's summed gradient: ``[-c, c]``.
        clip_row_norm: bounds its norm: ``g <- g min(1, c / (norm(g) + 1e-6))``, what
            ``torch.nn.utils.clip_grad_norm_`` does to one row. ``clip_value`` comes first, then
            this, then ``weight_decay``.
        deferred: backward collects the gradients of rows and :meth:`step` applies them; else
            backward steps the rows. See the file's docstring.

    Raises:
        TypeError: a module of another type.
        ValueError: a negative ``lr`` or ``weight_decay``, a bound that is not positive; no module,
            one without rows, or one that has a fused optimizer already. Nothing is attached then.

    Notes:
        ``g`` is the gradient summed over the row's occurrences, in fp32 (fp64 for fp64 rows). The
        same steps as ``torch.optim.SGD(lr)``, and no state. Its ``weight_decay`` moves every row in
        every step: the steps are the same if every row is in every batch.

    Example:
        >>> from esapn_kernels import ResizableEmbedding
        >>> emb = ResizableEmbedding(10, sizes=(2, 4))
        >>> rows, dense = SGD(emb, lr=0.1), torch.optim.SGD(emb.parameters(), lr=0.1)
        >>> emb(torch.tensor([3, 7])).sum().backward()  # steps rows 3 and 7
        >>> dense.step()  # steps the chain
        >>> emb.arena.storage.grad is None
        True

        Deferred, with two lookups and a bound on the norm of all gradients:

        >>> emb = ResizableEmbedding(10, sizes=(2, 4))
        >>> rows, dense = SGD(emb, lr=0.1, deferred=True), torch.optim.SGD([emb.chain], lr=0.1)
        >>> (emb(torch.tensor([3, 7])).sum() + emb(torch.tensor([3])).sum()).backward()
        >>> emb.arena.storage.grad
        RowGradient(shape=(20,), rows=3, dtype=torch.float32)
        >>> norm = torch.nn.utils.clip_grad_norm_(emb.parameters(), 1.0)
        >>> rows.step()  # steps rows 3 and 7
        >>> dense.step()
        >>> rows.zero_grad()
    """

    rule = "sgd"

    def __init__(
        self,
        modules: ResizableEmbedding | Iterable[ResizableEmbedding],
        lr: float,
        *,
        weight_decay: float = 0.0,
        clip_value: float | None = None,
        clip_row_norm: float | None = None,
        deferred: bool = False,
    ) -> None:
        _check_at_least_zero(lr, "learning rate")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "clip_value": clip_value,
            "clip_row_norm": clip_row_norm,
        }
        super().__init__(modules, defaults, deferred)


class Adagrad(FusedOptimizer):
    """Adagrad on the rows of the batch.

        element-wise  s <- s + g^2            e <- e - lr g / (sqrt(s) + eps)
        row-wise      s_x <- s_x + mean(g^2)  e <- e - lr g / (sqrt(s_x) + eps)

    Args:
        modules: one :class:`ResizableEmbedding` or an iterable of them.
        lr: learning rate.
        eps: added to the denominator.
        initial_accumulator_value: what ``s`` starts as, for a resized row again.
        rowwise: one number per row rather than one per element.
        weight_decay, clip_value, clip_row_norm, deferred: as for :class:`SGD`.

    Raises:
        TypeError, ValueError: as for :class:`SGD`, and for negative arguments.

    Notes:
        Element-wise the same steps as ``torch.optim.Adagrad`` with a dense gradient, whose rows
        without a gradient do not move. State: ``sum``, like the rows or ``[num_rows]``.
        Row-wise, ``s_x`` starts afresh when a row grows, for its mean was over other numbers.

    Example:
        >>> from esapn_kernels import ResizableEmbedding
        >>> emb = ResizableEmbedding(10, sizes=(2, 4))
        >>> rows = Adagrad(emb, lr=0.1, rowwise=True)
        >>> emb(torch.tensor([3, 7, 3])).sum().backward()
        >>> (rows.state[emb.arena.storage]["sum"] > 0).nonzero()[:, 0]
        tensor([3, 7])

    Source: Duchi, Hazan, Singer, JMLR 2011; row-wise: Mudigere et al., "Software-Hardware
    Co-design for Fast and Scalable Training of Deep Learning Recommendation Models", ISCA 2022.
    """

    def __init__(
        self,
        modules: ResizableEmbedding | Iterable[ResizableEmbedding],
        lr: float = 0.01,
        eps: float = 1e-10,
        initial_accumulator_value: float = 0.0,
        rowwise: bool = False,
        *,
        weight_decay: float = 0.0,
        clip_value: float | None = None,
        clip_row_norm: float | None = None,
        deferred: bool = False,
    ) -> None:
        _check_at_least_zero(lr, "learning rate")
        _check_at_least_zero(eps, "epsilon value")
        _check_at_least_zero(initial_accumulator_value, "initial_accumulator_value value")
        defaults = {
            "lr": lr,
            "eps": eps,
            "initial_accumulator_value": initial_accumulator_value,
            "rowwise": rowwise,
            "weight_decay": weight_decay,
            "clip_value": clip_value,
            "clip_row_norm": clip_row_norm,
        }
        super().__init__(modules, defaults, deferred)

    @property
    def rule(self) -> str:
        return "rowwise_adagrad" if self.param_groups[0]["rowwise"] else "adagrad"

    def _sum(self) -> dict[str, float]:
        return {"sum": self.param_groups[0]["initial_accumulator_value"]}

    @property
    def state_per_element(self) -> dict[str, float]:
        return self._sum() if self.rule == "adagrad" else {}

    @property
    def state_per_id(self) -> dict[str, float]:
        return self._sum() if self.rule == "rowwise_adagrad" else {}


class Adam(FusedOptimizer):
    """Lazy Adam on the rows of the batch; skipped steps are accounted for.

        t <- t + 1,   a = t - last_step_x,   last_step_x <- t
        m <- beta1^a m + (1 - beta1) g,      v <- beta2^a v + (1 - beta2) g^2
        e <- e - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
        row-wise   v_x <- beta2^a v_x + (1 - beta2) mean(g^2)   in place of v

    ``t`` counts the backward passes of lookups in the module (deferred: the calls of ``step`` with
    a gradient). The moments of a row are exactly those of ``torch.optim.Adam`` on a dense gradient,
    which is zero in the steps without the row: they decay for the steps missed when the row comes
    again. Only the row itself stays where it is meanwhile, while dense Adam moves it on by its
    momentum. (``torch.optim.SparseAdam`` does not decay them: the moments of a rare row are too
    large there.)

    Args:
        modules: one :class:`ResizableEmbedding` or an iterable of them.
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the denominator.
        rowwise: one second moment per row rather than one per element.
        weight_decay, clip_value, clip_row_norm, deferred: as for :class:`SGD`.

    Raises:
        TypeError, ValueError: as for :class:`SGD`, and for arguments out of range.

    Notes:
        The same steps as ``torch.optim.Adam`` if every row is in every batch. State: ``exp_avg``
        and ``exp_avg_sq`` like the rows (row-wise the latter is ``[num_rows]``), ``last_step``
        int32 ``[num_rows]``, and ``clock`` fp64 ``[3]``, ``(t, beta1^t, beta2^t)``, which backward
        moves on. A resized row starts afresh, the clock goes on.

    Example:
        >>> from esapn_kernels import ResizableEmbedding
        >>> emb = ResizableEmbedding(4, sizes=(2, 4))
        >>> rows = Adam(emb, lr=0.1)
        >>> for ids in ([0, 1], [1], [1, 3]):
        ...     emb(torch.tensor(ids)).sum().backward()
        >>> rows.state[emb.arena.storage]["last_step"]
        tensor([1, 3, 0, 3], dtype=torch.int32)

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015; row-wise:
    FBGEMM's ``PARTIAL_ROWWISE_ADAM``, which has no decay for steps missed.
    """

    def __init__(
        self,
        modules: ResizableEmbedding | Iterable[ResizableEmbedding],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        rowwise: bool = False,
        weight_decay: float = 0.0,
        clip_value: float | None = None,
        clip_row_norm: float | None = None,
        deferred: bool = False,
    ) -> None:
        _check_at_least_zero(lr, "learning rate")
        _check_at_least_zero(eps, "epsilon value")
        for index, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "rowwise": rowwise,
            "weight_decay": weight_decay,
            "clip_value": clip_value,
            "clip_row_norm": clip_row_norm,
        }
        super().__init__(modules, defaults, deferred)

    @property
    def rule(self) -> str:
        return "rowwise_adam" if self.param_groups[0]["rowwise"] else "adam"

    @property
    def state_per_element(self) -> dict[str, float]:
        if self.rule == "rowwise_adam":
            return {"exp_avg": 0.0}
        return {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    @property
    def state_per_id(self) -> dict[str, float]:
        if self.rule == "rowwise_adam":
            return {"exp_avg_sq": 0.0, "last_step": 0.0}
        return {"last_step": 0.0}

    def _fresh_state(self, arena: Arena | Table) -> dict[str, Tensor]:
        state = super()._fresh_state(arena)
        state["last_step"] = state["last_step"].to(torch.int32)
        device = arena.parameter.device
        clock = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64, device=device)
        state["clock"] = clock
        return state


class AdamW(Adam):
    """:class:`Adam` whose rows decay apart from their gradient, ``e <- e (1 - lr weight_decay)``.

    A row decays in the steps that meet it, before the rest of the step, and in no other:
    ``torch.optim.AdamW`` moves every row in every step.

    Args:
        modules, lr, betas, eps, rowwise, clip_value, clip_row_norm: as for :class:`Adam`.
        weight_decay: the decay.

    Raises:
        TypeError, ValueError: as for :class:`Adam`.

    Notes:
        The same steps as ``torch.optim.AdamW`` if every row is in every batch.

    Example:
        >>> from esapn_kernels import ResizableEmbedding
        >>> emb = ResizableEmbedding(4, sizes=(1,))
        >>> _ = torch.nn.init.ones_(emb.weight)
        >>> rows = AdamW(emb, lr=0.1, weight_decay=0.5)
        >>> (0 * emb(torch.tensor([1, 3]))).sum().backward()
        >>> emb.weight[:, 0].detach()
        tensor([1.0000, 0.9500, 1.0000, 0.9500])

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """

    decoupled = True

    def __init__(
        self,
        modules: ResizableEmbedding | Iterable[ResizableEmbedding],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        super().__init__(modules, lr, betas, eps, weight_decay=weight_decay, **options)


def _check_modules(
    modules: ResizableEmbedding | Iterable[ResizableEmbedding],
) -> list[ResizableEmbedding]:
    if isinstance(modules, ResizableEmbedding):
        modules = [modules]
    elif not isinstance(modules, Iterable):
        raise TypeError(
            "modules argument given to the optimizer should be a ResizableEmbedding or an iterable "
            f"of them, but got {type(modules).__name__}"
        )
    found = list(modules)
    if not found:
        raise ValueError("optimizer got an empty module list")
    for i, module in enumerate(found):
        if not isinstance(module, ResizableEmbedding):
            raise TypeError(
                f"optimizer can only optimize ResizableEmbedding, got {type(module).__name__}"
            )
        rows = module.arena.parameter
        if rows is None:
            raise ValueError("optimizer got a ResizableEmbedding whose weight is no Parameter")
        if not rows.numel():
            raise ValueError("optimizer got a ResizableEmbedding without rows")
        if not rows.is_contiguous():
            raise ValueError(_STRIDED)
        if any(module.arena is other.arena for other in found[:i]):
            raise ValueError("optimizer got the same ResizableEmbedding twice")
        if module.agree is not None:
            raise ValueError(
                "the module is a replica, whose gradients are averaged, and those of a fused "
                "optimizer are not: use an optimizer of torch.optim"
            )
        if (attached := module.arena.fused_optimizer) is not None:
            raise ValueError(
                f"the module already has a fused optimizer, {type(attached).__name__}: "
                "call its detach() first"
            )
    return found


def _check_at_least_zero(value: float, name: str) -> None:
    if not value >= 0.0:
        raise ValueError(f"Invalid {name}: {value}")
