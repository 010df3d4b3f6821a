"""Pruning criteria: frozen objects that score weights, one file each. docs/CRITERIA.md lists their formulas."""

from __future__ import annotations

from .base import Criterion
from .gem_miner import GemMiner
from .grasp import GraSP
from .instant_soup import InstantSoup
from .lamp import LAMP
from .magnitude import Magnitude
from .ntk_trace import NTKTrace
from .ntksap import NTKSAP
from .px import PX
from .random import Random
from .snip import SNIP
from .synflow import SynFlow, SynFlowL2
from .wanda import Wanda

CRITERIA: dict[str, Criterion] = {
    "px": PX(),
    "px-active": PX(paths="active", power=0.25),
    "px-balanced": PX(paths="active", power=0.25, balance=True),
    "magnitude": Magnitude(),
    "lamp": LAMP(),
    "random": Random(),
    "random-erk": Random(densities="erk"),
    "snip": SNIP(),
    "grasp": GraSP(),
    "synflow": SynFlow(),
    "synflow-l2": SynFlowL2(),
    "ntk-sap": NTKSAP(),
    "ntk-trace": NTKTrace(),
    "ntk-trace-sampled": NTKTrace(probes=1),
    "wanda": Wanda(),
    "gem-miner": GemMiner(),
    "instant-soup": InstantSoup(),
}
"""Names for files and the command line."""

__all__ = [
    "CRITERIA",
    "LAMP",
    "NTKSAP",
    "PX",
    "SNIP",
    "Criterion",
    "GemMiner",
    "GraSP",
    "InstantSoup",
    "Magnitude",
    "NTKTrace",
    "Random",
    "SynFlow",
    "SynFlowL2",
    "Wanda",
]
