"""What a repair did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerRepair:
    """One layer: its relative output error ‖ŷ − y‖ / ‖y‖ against the dense network, before and after.

    Attributes:
        name: of its weight.
        rows: samples that it was fitted to: images × tokens or positions.
        inputs: of one output.
        error_before: on the images fitted to, with the layers before it repaired.
        error_after: likewise, after the repair.
        held_out_before: on images not fitted to; 0 if there are none.
        held_out_after: likewise, after the repair.
        repaired: False: it grew on the images held out, so the layer was left as it was.
    """

    name: str
    rows: int
    inputs: int
    error_before: float
    error_after: float
    held_out_before: float
    held_out_after: float
    repaired: bool


@dataclass(frozen=True)
class RepairReport:
    """What `px_hf.reconstruct_` returns: `str()` is a table, `to_dict()` is for JSON.

    Attributes:
        method: "layers", "blocks" or "network".
        images: how many it was fitted to.
        held_out: how many were kept apart to measure on.
        layers: in running order.
        skipped: weight -> why it was not repaired.
        blocks: with method "blocks", the errors of whole blocks; with "network", those of its outputs, one row.
    """

    method: str
    images: int
    held_out: int
    layers: tuple[LayerRepair, ...]
    skipped: dict[str, str]
    blocks: tuple[LayerRepair, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can say it."""
        return asdict(self)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "rows", "inputs", "error", "repaired", "held out", "repaired")]
        for layer in (*self.layers, *self.blocks):
            errors = (layer.error_before, layer.error_after, layer.held_out_before, layer.held_out_after)
            note = layer.name if layer.repaired else f"{layer.name} (left)"
            rows.append((note, f"{layer.rows:,}", f"{layer.inputs:,}", *(f"{e:.3f}" for e in errors)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        lines = [table[0], "-" * len(table[0]), *table[1:], ""]
        lines.append(
            f"Relative output error against the dense network, before and after; fitted to {self.images} images, "
            f"{self.held_out} held out."
        )
        lines += [f"Not repaired: {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)
