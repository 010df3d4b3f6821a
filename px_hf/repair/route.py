"""The shortest way through a network that sees each layer with the inputs that repaired layers before it leave.

A layer's inputs in the repaired network are known once the layers before it are repaired, so each layer needs a
forward of its own. It need not be a forward of everything: where a module hands its result to the next as it is, as
the blocks of a ViT or ResNet do, what flows between them is kept, and only the module itself runs again. Which modules
these are is not told by their names but seen in a forward: the output of one *is* the input of the next.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .probe import Layer, Record, Visit


@dataclass(frozen=True)
class Step:
    """Layers that are repaired together, group after group, in forwards of one module.

    Attributes:
        groups: layers with the same input, which one forward serves; each group in running order.
        visit: the module; None: the whole network.
        follows: which output of the step before is its input; None: it takes a whole forward to know.
    """

    groups: tuple[tuple[Layer, ...], ...]
    visit: Visit | None = None
    follows: int | None = None


def grouped(record: Record) -> list[tuple[Layer, ...]]:
    """The layers in running order (by their last call); those called once, in turn, with one input are together."""
    groups: list[tuple[Layer, ...]] = []
    for layer in sorted(record.layers.values(), key=lambda layer: layer.times[-1]):
        last = groups[-1][-1] if groups else None
        if last and len(last.times) == len(layer.times) == 1 and last.inputs == layer.inputs:
            groups[-1] += (layer,)
        else:
            groups.append((layer,))
    return groups


def route(record: Record, only: Collection[str] | None = None) -> list[Step]:
    """Steps that cover all layers of the record, at about the least cost.

    ``only``: the paths of the modules that may be steps; None: any.
    """
    groups = grouped(record)
    spans = [(group[0].times[0], group[-1].times[-1]) for group in groups]
    visits = [v for v in record.visits if only is None or v.path in only]
    inside = [_inside(visit, spans) for visit in visits]
    chosen = [(v, i) for v, i in zip(visits, inside, strict=True) if i]
    order = sorted(chosen, key=lambda pair: pair[0].end)
    total = len(groups)

    # The cheapest way to repair all groups before `done` that ends with visit k: a forward of the whole for each group
    # outside visits and for each visit whose input no other hands on, half a forward of the visit for a group inside.
    best: list[tuple[float, int]] = []
    for k, (visit, (first, count)) in enumerate(order):
        own = count * (count + 2) / 2
        ways = [((first + 1) * total + own, -1)]
        for j in range(k):
            before, (start, size) = order[j]
            if before.end < visit.start and start + size <= first:
                link = 0 if follows(before, visit) is not None else total
                ways.append((best[j][0] + link + (first - start - size) * total + own, j))
        best.append(min(ways))
    ends = [(total * total + 0.0, -1)] if only is None or not order else []  # blocks that were named must be met
    ends += [(best[k][0] + (total - first - count) * total, k) for k, (_, (first, count)) in enumerate(order)]
    k = min(ends)[1]
    path: list[int] = []
    while k >= 0:
        path.append(k)
        k = best[k][1]
    return _steps(groups, [order[k] for k in reversed(path)])


def _steps(groups: Sequence[tuple[Layer, ...]], path: Sequence[tuple[Visit, tuple[int, int]]]) -> list[Step]:
    steps: list[Step] = []
    done, before = 0, None
    for visit, (first, count) in path:
        if first > done:
            steps.append(Step(tuple(groups[done:first])))
            before = None
        link = None if before is None else follows(before, visit)
        steps.append(Step(tuple(groups[first : first + count]), visit, link))
        done, before = first + count, visit
    if done < len(groups):
        steps.append(Step(tuple(groups[done:])))
    return steps


def _inside(visit: Visit, spans: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The first group inside a visit, and how many there are; None if there is none, or one lies inside in part."""
    touched = [i for i, (first, last) in enumerate(spans) if first < visit.end and last > visit.start]
    whole = all(visit.start < spans[i][0] and spans[i][1] < visit.end for i in touched)
    if not touched or not whole or touched != list(range(touched[0], touched[-1] + 1)):
        return None
    return touched[0], len(touched)


def follows(before: Visit, visit: Visit) -> int | None:
    """Which output of the one module is the only tensor that the other is called with."""
    if len(visit.inputs) != 1 or visit.inputs[0] not in before.outputs:
        return None
    return before.outputs.index(visit.inputs[0])
