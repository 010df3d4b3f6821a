"""FSDP2: a model that `fully_shard` has sharded is pruned, trained and saved as one that a single process holds."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_process import PRUNED, pruned
from test_processes import HERE, environment
from torch import Tensor

import px_hf as px
from px_hf.model.shards import Shards
from px_hf.scopes import as_scope
from px_hf.scopes.sharded import choose_sharded

QUICK = ["0", "3", "zeros_kept", "refused"]
ALL = [*map(str, range(len(PRUNED))), "zeros_kept", "whole_masks", "refused"]


@functools.cache
def launched(folder: Path, processes: int, jobs: tuple[str, ...]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(HERE / "sharded_process.py"), str(folder), *jobs]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"facts {rank}.json").read_text()) for rank in range(processes)]


@dataclass
class Run:
    folder: Path
    facts: list[dict[str, Any]]
    jobs: list[str]


@pytest.fixture(
    scope="module",
    params=[pytest.param((2, QUICK), id="2"), pytest.param((4, ALL), id="4", marks=pytest.mark.slow)],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One launch for all tests: processes take seconds to start."""
    processes, jobs = request.param
    folder = tmp_path_factory.mktemp(f"sharded{processes}")
    return Run(folder, launched(folder, processes, tuple(jobs)), jobs)


def test_masks_are_those_of_one_process_to_the_bit(run: Run) -> None:
    for job in filter(str.isdigit, run.jobs):
        _, expected = pruned(*PRUNED[int(job)])
        found = px.Masks.load(run.folder / f"{job}.safetensors")
        assert list(found) == list(expected)
        assert found == expected, PRUNED[int(job)]
        assert all(facts[f"untouched {job}"] for facts in run.facts)


def test_zeros_stay_and_masks_are_held_in_parts(run: Run) -> None:
    total = 0
    for facts in run.facts:
        assert facts["equal"] == [True, True, True]
        assert facts["fingerprint"]
        assert facts["report"]
        assert facts["revived before"]
        assert facts["revived"] == [{}, {}]
        assert facts["moved"]
        assert facts["revived without"], "nothing would have come back: the test proves nothing"
        assert facts["optimizer states of pruned weights"] == [True, 0]
        held, weights = facts["held"]
        assert facts["bits"] == held <= 1.1 * weights / len(run.facts)
        total += held
    assert total == weights
    if "whole_masks" in run.jobs:
        assert all(facts["accelerate shards"] and facts["revived without, accelerate"] for facts in run.facts)
        assert all(facts["revived, accelerate"] == {} for facts in run.facts)


def test_what_is_saved_from_shards_loads_everywhere(run: Run) -> None:
    from transformers import AutoModelForImageClassification

    trained = torch.load(run.folder / "trained.pt", weights_only=True)
    masks = px.Masks.load(run.folder / "masks.safetensors")
    assert px.Masks.from_pretrained(run.folder / "saved") == masks
    for model in (
        px.from_pretrained(run.folder / "saved"),
        AutoModelForImageClassification.from_pretrained(run.folder / "saved"),
    ):
        assert not masks.revived(model)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, trained[name]), name
    config = json.loads((run.folder / "saved" / "config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"]
    assert config["px"]["masks_sha256"] == masks.fingerprint()
    assert not (run.folder / "not").exists()
    assert all("weights that the masks prune are not zero" in facts["not masked"] for facts in run.facts)


REFUSED = {
    "structured": "InvalidArgumentError: scope='structured' takes out whole units",
    "reconstruct": "TargetError: FSDPSequential does not hold its weights",
    "tune_only": "TargetError: FSDPSequential does not hold its weights",
    "gradual": "TargetError: FSDPSequential does not hold its weights",
    "score": "TargetError: FSDPSequential does not hold its weights",
    "whole model": "TargetError: The masks are sharded over",
    "single mask": "TargetError: these masks are sharded over the processes",
    "no library": "InvalidArgumentError: save_pretrained needs a model of transformers or timm",
    "different models": "LaunchError: the processes hold shards of different models",
    "nan": "TargetError: the weight 1.weight holds NaN",
}


def test_what_is_not_supported_is_refused_on_every_process(run: Run) -> None:
    for facts in run.facts:
        assert facts["refused"].keys() == REFUSED.keys()
        for what, beginning in REFUSED.items():
            assert facts["refused"][what].startswith(beginning), facts["refused"][what]


@dataclass
class Meeting:
    """Threads in place of processes: what each brings, seen by all."""

    size: int
    brought: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size)

    def exchange(self, rank: int, tensor: Tensor) -> Tensor:
        self.barrier.wait(60)
        self.brought[rank] = tensor
        self.barrier.wait(60)
        return torch.stack([self.brought[each] for each in range(self.size)])


class Member(Shards):
    """`Shards` whose collectives are meetings."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__(None, rank, meeting.size, torch.device("cpu"))  # type: ignore[arg-type]
        object.__setattr__(self, "meeting", meeting)

    def total(self, counts: Tensor) -> Tensor:
        return self.meeting.exchange(self.rank, counts).sum(0)  # type: ignore[attr-defined]

    def of_each(self, counts: Tensor) -> Tensor:
        return self.meeting.exchange(self.rank, counts)  # type: ignore[attr-defined]


def together(size: int, work: Callable[[Member], Any]) -> list[Any]:
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [Member(meeting, rank) for rank in range(size)]))


def scores_with_ties(dtype: torch.dtype) -> dict[str, Tensor]:
    """Few values, so that the border lies within ties; rows that do not divide; fewer rows than processes."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 5), "b": (1, 9), "c": (4, 3, 2), "d": (2, 6), "e": (13,)}
    return {name: torch.randint(0, 4, shape, generator=generator).to(dtype) / 3 for name, shape in shapes.items()}


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("settings", [("global", 0.0), ("global", 0.2), ("layer", 0.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_choice_by_counts_is_that_of_whole_scores(
    size: int, settings: tuple[str, float], dtype: torch.dtype
) -> None:
    scope, floor = settings
    scores = scores_with_ties(dtype)
    shapes = {name: score.shape for name, score in scores.items()}

    def choose(member: Member) -> list[dict[str, Tensor]]:
        parts = {name: member.part(score) for name, score in scores.items()}
        found, masks = [], None
        for sparsity in (0.35, 0.5, 0.7):
            masks = choose_sharded(
                as_scope(scope), parts, shapes, member, sparsity, within=masks, min_layer_density=floor
            )
            assert masks.kept == expected[sparsity].kept
            found.append(dict(masks.parts))
        return found

    expected: dict[float, px.Masks] = {}
    before = None
    for sparsity in (0.35, 0.5, 0.7):
        before = px.select(scores, sparsity=sparsity, scope=scope, within=before, min_layer_density=floor)
        expected[sparsity] = before
    each = together(size, choose)
    for step, masks in enumerate(expected.values()):
        for name, mask in masks.items():
            assert torch.equal(torch.cat([parts[step][name] for parts in each]), mask), (step, name)


def test_a_bad_score_on_one_process_is_an_error() -> None:
    scores = {"a": torch.tensor([[1.0], [float("nan")]])}
    member = Member(Meeting(1), 0)
    with pytest.raises(px.NonFiniteError, match="'a' are NaN"):
        choose_sharded(as_scope("global"), scores, {"a": torch.Size((2, 1))}, member, 0.5)


@pytest.mark.slow
def test_bytes_on_the_wire_are_those_of_the_formulae(tmp_path: Path) -> None:
    script = HERE.parent / "recipes" / "benchmarks" / "sharded.py"
    command = [sys.executable, str(script), "--processes", "2"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 9
    for _, what, key, formula, counted in rows:
        assert int(counted) == pytest.approx(int(formula), rel=0.01), (what, key)
