"""The cases of ``bench/cpu.py``: what ours is measured against on a CPU, and how it is timed.

    fixed    ``nn.Embedding(N, 128)``; in steps with a dense gradient and fused ``torch.optim``
    before   the package of an earlier checkout (before.py)
    eager    a promotion size by size, with room prepared (promotions.py)
    fbgemm   its table of bags, 128 wide (peers.py)

Ours has the paper's mix of sizes, and in steps its rows are stepped inside backward and its hops by
a ``torch.optim`` optimizer of the same kind, whose time counts.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .before import step_before
from .gate import check, check_forward, equal_runs, make_reference
from .peers import Fbgemm, FbgemmStep
from .promotions import PROMOTED, measure_promotion
from .providers import Fixed, Forward, Ours, Provider, TableSpec, Workload, make_workload
from .ratios import Line, judge
from .roof import forward_bytes, forward_flop
from .timing import Entry, Timer
from .updates import RULES, Step, dense_step, fused_optimizer, fused_step, step_entries

CPU = torch.device("cpu")
SMALL, MEDIUM, LARGE = 500, 1 << 16, 1 << 20
RUNS = 20
_IDS_A_TURN = 20_000  # calls of fewer ids are repeated up to so many
_FEW, _BATCHES = 4096, 64  # so many batches of few ids, so that their rows leave the caches
_MOST = 5  # large products


@dataclass(frozen=True)
class Case:
    """One line to measure.

    Attributes:
        what: ``forward`` (without gradient), ``dense`` (forward and backward to a dense gradient),
            ``step`` (forward, backward, optimizers), ``promote`` or ``bits``.
        ids: of a batch, or rows to promote.
        traffic: ``uniform`` or ``zipf``.
        rule: of steps.
        against: see the file's docstring.
        threads: one is timed by the process's CPU time, more by a wall clock.
        goal, stretch: see ``Line``.
    """

    what: str
    ids: int
    traffic: str = "uniform"
    rule: str = ""
    against: str = "fixed"
    threads: int = 1
    goal: float | None = None
    stretch: float | None = None

    @property
    def name(self) -> str:
        """As ``--rows`` takes it.

        >>> Case("step", 500, rule="sgd", against="before").name
        'step-sgd-500-uniform-before'
        """
        parts = [self.what, self.rule.replace("_", "-")]
        if self.what != "bits":
            parts += [str(self.ids), "" if self.what == "promote" else self.traffic]
            parts += [self.against if self.against != "fixed" else ""]
            parts += [f"{self.threads}-threads" if self.threads > 1 else ""]
        return "-".join(filter(None, parts))

    @property
    def has_default(self) -> bool:
        """Whether it is measured in a process with the default allocator as well."""
        timed = self.what in ("forward", "step") and self.ids == MEDIUM
        return timed and self.against == "fixed" and self.threads == 1


def _both(goals: Sequence[float], stretches: Sequence[float | None], **case: Any) -> list[Case]:
    """A case on uniform ids, and one on Zipf."""
    pairs = zip(("uniform", "zipf"), goals, stretches, strict=True)
    return [Case(traffic=t, goal=goal, stretch=stretch, **case) for t, goal, stretch in pairs]


CASES = (
    Case("forward", 64),
    *_both((0.5, 1.0), (0.8, 1.2), what="forward", ids=SMALL),
    *_both((1.15, 1.4), (1.5, 2.0), what="forward", ids=MEDIUM),
    Case("forward", LARGE),
    Case("forward", LARGE, "zipf"),
    Case("dense", SMALL),
    Case("dense", MEDIUM),
    *_both((2.0, 2.5), (3.0, 4.0), what="step", rule="adam", ids=MEDIUM),
    *_both((2.0, 2.5), (3.0, 4.0), what="step", rule="sgd", ids=MEDIUM),
    *(
        Case("step", SMALL, rule=rule, against="before", goal=9.0)
        for rule in ("sgd", "adagrad", "adam")
    ),
    *_both((1.0, 1.0), (1.3, 1.3), what="forward", ids=MEDIUM, against="fbgemm"),
    *_both((1.0, 1.0), (1.3, 1.3), what="step", rule="sgd", ids=MEDIUM, against="fbgemm"),
    *_both(
        (0.8, 0.8), (1.3, 1.3), what="step", rule="rowwise_adagrad", ids=MEDIUM, against="fbgemm"
    ),
    Case("promote", PROMOTED, rule="adam", against="eager", goal=1.9, stretch=3.0),
    # Last: a second thread of torch's may spin for a while, and CPU time has it.
    *_both((1.1, 1.3), (None, None), what="forward", ids=MEDIUM, threads=2),
    *(Case("bits", MEDIUM, "zipf", rule, "", 2, goal=RUNS) for rule in RULES),
)


@contextlib.contextmanager
def running_on(threads: int) -> Iterator[None]:
    """torch with so many threads, on as many cores where the platform can bind a process."""
    before = torch.get_num_threads()
    can_bind = hasattr(os, "sched_setaffinity")
    cores = os.sched_getaffinity(0) if can_bind else set()
    torch.set_num_threads(threads)
    if can_bind:
        # The last ones: interrupts are mostly served by the first.
        os.sched_setaffinity(0, sorted(cores)[-threads:])
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if can_bind:
            os.sched_setaffinity(0, cores)


def cores() -> int:
    """That this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Bench:
    """Measures cases on one table.

    Args:
        spec: the table.
        backend: ``backend=`` of ours.
        allocator: for the lines.
        turns: of every case.
        seed: of ids and gradients, the same whatever was measured before.
        before: the package of an earlier checkout, for the cases against it.
        product: rows and columns of the large product.
    """

    def __init__(
        self,
        spec: TableSpec,
        backend: str,
        allocator: str,
        turns: int,
        seed: int,
        before: ModuleType | None = None,
        product: int = 2048,
    ) -> None:
        self.spec, self.backend, self.allocator = spec, backend, allocator
        self.turns, self.seed = turns, seed
        self.generator = torch.Generator()
        self.package, self.product = before, product
        self.gflops: dict[int, float] = {}
        self.timer = Timer(CPU)

    @cached_property
    def ours(self) -> Ours:
        """For what leaves its rows as they are."""
        return self._fresh()

    def _fresh(self) -> Ours:
        return Ours(self.spec, CPU, backend=self.backend)

    def measure(self, case: Case) -> Line:
        """Check and time one case.

        Raises:
            GateError: ours or the other is wrong; nothing of it has been timed.
        """
        line = Line(
            case.name,
            _other(case),
            self.allocator,
            case.threads,
            "CPU" if case.threads == 1 else "wall",
            case.ids,
            goal=case.goal,
            stretch=case.stretch,
        )
        torch.manual_seed(self.seed)
        self.generator.manual_seed(self.seed)
        with running_on(case.threads):
            self.timer.clock = time.process_time if case.threads == 1 else time.perf_counter
            if case.what == "bits":
                self._compare_bits(case, line)
            elif case.what == "promote":
                rows, _ = measure_promotion(
                    self.spec, self.ours, self.timer, self.turns, self.generator
                )
                line.take(*rows)
                line.ids = rows[0].ids
            else:
                self._time(case, line)
        return line

    def _time(self, case: Case, line: Line) -> None:
        workload = self._workload(case)
        kinds = {"forward": self._forwards, "dense": self._dense, "step": self._steps}
        line.calls = max(1, _IDS_A_TURN // case.ids)
        entries = [replace(e, calls=line.calls) for e in kinds[case.what](case, workload)]
        ours, other = self.timer.measure(entries, self.turns)
        line.take(ours, other)
        if case.what == "forward":
            line.floor_bytes_ms = ours.roof_ms
            flop = forward_flop(workload.looked())
            line.floor_products_ms = flop / self._rate(case.threads) / 1e6

    def _workload(self, case: Case) -> Workload:
        number = _BATCHES if case.ids <= _FEW else None
        return make_workload(self.spec, case.traffic, case.ids, CPU, self.generator, number)

    def _forwards(self, case: Case, workload: Workload) -> list[Entry]:
        other = Fbgemm(self.spec) if case.against == "fbgemm" else Fixed(self.spec, CPU)

        def entry(provider: Ours | Fixed) -> Entry:
            forward = Forward(case.name, provider.name, provider, provider)
            error = check_forward(forward, workload.batches[0])
            looked = workload.looked(ragged=provider.ragged)
            row = workload.row("forward", provider.name, looked, forward_bytes, gate_error=error)
            return Entry(row, lambda call, _: provider(workload.batch(call)), around=torch.no_grad)

        return [entry(self.ours), entry(other)]

    def _dense(self, case: Case, workload: Workload) -> list[Entry]:
        def entry(provider: Provider) -> Entry:
            ids = workload.batches[0]
            assert isinstance(provider, Ours | Fixed)
            error = check(provider, ids, make_reference(provider, ids))
            looked = workload.looked(ragged=provider.ragged)
            row = workload.row("dense", provider.name, looked, forward_bytes, gate_error=error)

            def both(call: int, _: Any) -> tuple[Tensor, ...]:
                return provider.backward(provider(workload.batch(call)), workload.grad)

            return Entry(row, both)

        return [entry(self.ours), entry(Fixed(self.spec, CPU))]

    def _steps(self, case: Case, workload: Workload) -> list[Entry]:
        steps = [fused_step(self._fresh(), case.rule), self._other_step(case)]
        # The first entry of a step is the whole of it.
        return [step_entries(workload, step, case.rule)[0] for step in steps]

    def _other_step(self, case: Case) -> Step:
        if case.against == "fbgemm":
            return FbgemmStep(self.spec, case.rule)
        if case.against == "before":
            assert self.package is not None
            return step_before(self.spec, self.package, case.rule)
        return dense_step(Fixed(self.spec, CPU), case.rule, "fixed")

    def _compare_bits(self, case: Case, line: Line) -> None:
        """Two steps anew in every run, with one and with two threads in turns."""
        ids, grad = self._workload(case).batches[:2], torch.randn(case.ids, 128)
        threads = itertools.cycle((1, case.threads))

        def run() -> list[Tensor]:
            torch.set_num_threads(next(threads))
            ours = copy.deepcopy(self.ours)
            optimizer = fused_optimizer(case.rule, ours.module)
            outs = []
            for batch in ids:
                outs.append(ours(batch))
                outs[-1].backward(grad)
            chain_grad = ours.module.chain.grad
            assert chain_grad is not None
            state = optimizer.state[ours.storage].values()
            return [*(out.detach() for out in outs), ours.storage.detach(), chain_grad, *state]

        line.runs, line.equal = RUNS, equal_runs(run, RUNS)
        line.status = judge(line.equal, case.goal, case.stretch)

    def _rate(self, threads: int) -> float:
        """GFLOP/s of the fastest of some large products with this number of threads."""
        if threads not in self.gflops:
            a, b = (torch.randn(self.product, self.product) for _ in range(2))
            out = torch.empty_like(a)
            times = [self.timer.time(lambda: torch.mm(a, b, out=out))[0] for _ in range(_MOST + 1)]
            self.gflops[threads] = 2 * self.product**3 / min(times[1:]) / 1e6
        return self.gflops[threads]


def _other(case: Case) -> str:
    if case.what == "bits":
        return "1, 2 threads"
    return "nn.Embedding" if case.against == "fixed" else case.against
