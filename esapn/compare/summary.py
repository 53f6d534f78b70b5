"""The sentences of the page: the best method, the reference, the reference at equal bytes."""

from __future__ import annotations

from .contrasts import Contrast, best_control, paired_contrasts, same_bytes
from .formats import PERCENT, count, loss, mean, of_fixed128, percent, plural, signed
from .records import Group
from .tables import place

__all__ = ["summary"]


def summary(group: Group) -> list[str]:
    """What a group's records show, a sentence or two an entry."""
    if not group.records:
        return ["No run of this part has finished."]
    best, reference = group.finished[0], group.reference_method
    lines = [f"The lowest mean loss is that of {best.label}: {_standing(group, best.label)}."]
    if reference is None:
        missing = f"The reference method, {group.reference}, has no finished run"
        return [*lines, f"{missing if group.reference else 'No reference method is named'}."]
    mine = reference.label
    if mine != best.label:
        rank = [method.label for method in group.finished].index(mine) + 1
        lines.append(
            f"The reference, {mine}, is number {rank} of {len(group.finished)} by loss: "
            f"{_standing(group, mine)}."
        )
    control = best_control(group)
    if control is None:
        lines.append(f"No control has runs at the bytes of {mine} or fewer.")
    else:
        lines += _control_lines(group, control, mine)
    lines.append(_dominated(group, mine))
    return lines


def _standing(group: Group, label: str) -> str:
    seeds = len(group.of(label))
    return (
        f"{group.loss_name} {mean(group.interval(label, 'loss'), loss)}, "
        f"accuracy {mean(group.interval(label, 'accuracy'), percent)}{PERCENT}, "
        f"{count(group.mean(label, 'serving'))} serving bytes "
        f"({of_fixed128(group, label, 'serving')} of plain tables; "
        f"{plural(seeds, 'seed') if seeds > 1 else 'one seed, so no interval'})"
    )


def _control_lines(group: Group, control: Contrast, mine: str) -> list[str]:
    d = control.loss.difference
    text = (
        f"At the serving bytes of {mine}, or fewer where a family ends below them, the best "
        f"control is the family {control.name} ({place(control)}). There the {group.loss_name} of "
        f"{mine} is {loss(abs(d.mean))} {'lower' if d.mean < 0 else 'higher'}"
    )
    points = signed(100 * control.accuracy.difference.mean, 2)
    if d.half is None:
        return [f"{text} and its accuracy differs by {points} points (one seed, so no verdict)."]
    text += (
        f" (95{PERCENT} interval of the difference {signed(d.low, 5)} to {signed(d.high, 5)}, "
        f"{plural(d.n, 'seed')}): {control.loss.verdict}. Its accuracy differs by {points} points: "
        f"{control.accuracy.verdict}."
    )
    verdicts = [c.loss.verdict for c in same_bytes(group) if not c.larger]
    better, worse = verdicts.count("better"), verdicts.count("worse")
    return [
        text,
        f"Of {plural(len(verdicts), 'control family', 'control families')} that have runs at its "
        f"bytes or fewer, {mine} has a lower loss than {better} and a higher one than {worse}; for "
        f"{len(verdicts) - better - worse} no difference is shown.",
    ]


def _dominated(group: Group, mine: str) -> str:
    """Which methods are better than the reference by both bytes and loss."""
    serving, standing = group.mean(mine, "serving"), group.standing(mine)
    above = [
        method.label
        for method in group.finished
        if group.mean(method.label, "serving") <= serving
        and group.standing(method.label) < standing
    ]
    if not above:
        return f"No method has both a lower mean loss and no more serving bytes than {mine}."
    verdicts = {c.name: c.loss.verdict for c in paired_contrasts(group)}
    sure = [label for label in above if verdicts.get(label) == "worse"]
    many = plural(len(above), "method has", "methods have")
    text = f"{many} a lower mean loss with no more bytes than {mine}: {', '.join(above)}"
    return f"{text}; the difference is clear for {', '.join(sure) if sure else 'none'}."
