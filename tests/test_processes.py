"""The same masks on 1 or N real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import build, images

import px_hf as px
from px_hf.scoring.sums import exact_sum

HERE = Path(__file__).parent

SCRIPT = """
import gc, sys, torch, torch.distributed as dist
import px_hf as px
from networks import build, images
torch.set_num_threads(1)
px.distributed.processes()
out, name, criterion, count, fail = sys.argv[1:6]
sent = []
if fail == "count":
    real = dist.all_reduce
    def counting(tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return real(tensor, *args, **kwargs)
    dist.all_reduce = counting
x = images(int(count))
batches = [x[i : i + 2] for i in range(0, len(x), 2)]
model = build(name)
if fail == "other batches" and dist.get_rank() == 1:
    batches.reverse()
if fail == "other weights" and dist.get_rank() == 1:
    torch.nn.init.normal_(next(model.parameters()))
if fail == "channels last":
    model.to(memory_format=torch.channels_last)
if fail == "ddp":
    import accelerate
    model = accelerate.Accelerator(cpu=True).prepare(model)
    assert dist.is_initialized() == isinstance(model, torch.nn.parallel.DistributedDataParallel)
if fail == "nan":  # which only the process that scores the last batch sees
    batches[-1][0] = float("nan")
sent.clear()
masks = px.prune(model, batches, eval(criterion), sparsity=0.7, rounds=2, progress=False)
rank = dist.get_rank() if dist.is_initialized() else 0
masks.save(f"{out}/{rank}.safetensors")
if fail == "count":
    assert sum(sent[4:]) <= 2 * (5 + 1), sent  # after the check that all agree: two rounds
if dist.is_initialized():
    del model  # DDP holds the group, whose threads then end with the interpreter: now and then that aborts
    gc.collect()
    dist.destroy_process_group()
"""


def environment(**changes: str) -> dict[str, str]:
    cleared = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    return (
        cleared
        | {
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }
        | changes
    )


def launch(
    folder: Path, processes: int, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    out = folder / str(processes)
    out.mkdir()
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = (run if processes > 1 else [sys.executable]) + [str(script), str(out), *arguments]
    return subprocess.run(command, env=env or environment(), capture_output=True, text=True, timeout=240)


ROWS = [
    ("hf vit", "px.PX()", 7, (2, 3), "count"),  # four batches over two and three processes
    ("timm resnet", "px.PX('active', power=0.25)", 5, (2,), ""),
    ("cnn", "px.PX()", 3, (4,), ""),  # two batches over four processes: two have none
    ("hf resnet", "px.PX('active')", 3, (3,), "channels last"),  # the third process has none
    ("hf resnet", "px.PX()", 5, (2,), "ddp"),
]
SLOW = [("mlp", "px.PX('active')", 2, (3,), "")]


@pytest.mark.parametrize(
    ("name", "criterion", "count", "processes", "check"),
    [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)],
    ids=[f"{row[0]} {row[4]}".strip() for row in ROWS + SLOW],
)
def test_masks_do_not_depend_on_the_number_of_processes(
    name: str, criterion: str, count: int, processes: tuple[int, ...], check: str, tmp_path: Path
) -> None:
    arguments = (name, criterion, str(count), check)
    for n in (1, *processes):
        done = launch(tmp_path, n, *arguments)
        assert done.returncode == 0, done.stderr
    expected = px.Masks.load(tmp_path / "1" / "0.safetensors")
    for n in processes:
        for rank in range(n):
            assert px.Masks.load(tmp_path / str(n) / f"{rank}.safetensors") == expected


def test_processes_that_do_not_know_of_each_other_are_an_error(tmp_path: Path) -> None:
    """torchrun on a machine without GPUs and without ACCELERATE_USE_CPU."""
    env = environment(ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES="")
    done = launch(tmp_path, 2, "mlp", "px.PX()", "3", "", env=env)
    assert done.returncode != 0
    assert "LaunchError: 2 processes were launched but Accelerate sees 1" in done.stderr
    assert "torchrun --nproc_per_node" in done.stderr


@pytest.mark.parametrize(
    ("what", "message"),
    [("other batches", "DataError: the processes were given different batches"),
     ("other weights", "LaunchError: the processes hold models with different weights")],
)  # fmt: skip
def test_processes_that_disagree_are_an_error(what: str, message: str, tmp_path: Path) -> None:
    done = launch(tmp_path, 2, "mlp", "px.PX()", "6", what)
    assert done.returncode != 0
    assert message in done.stderr


def test_an_error_on_one_process_ends_all(tmp_path: Path) -> None:
    done = launch(tmp_path, 2, "mlp", "px.PX() if int(__import__('os').environ['RANK']) else px.PX(power=-1)", "3", "")
    assert done.returncode != 0
    assert "power=-1" in done.stderr


def test_an_error_in_the_middle_of_scoring_ends_all(tmp_path: Path) -> None:
    """One process meets NaN in its share, while the other waits for it at the sum."""
    done = launch(tmp_path, 2, "cnn", "px.PX()", "4", "nan")
    assert done.returncode != 0
    assert "NonFiniteError: the network's output for batch 1 is not finite" in done.stderr


def test_exact_sum_does_not_depend_on_order_or_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = [(torch.rand(6, dtype=torch.float64, generator=generator), e) for e in (0, 3, -2, 900, 905, 899)]
    terms.append((torch.zeros(6, dtype=torch.float64), 0))
    one, exponent = exact_sum(terms, 6, len(terms), torch.device("cpu"))
    other, same = exact_sum(terms[::-1], 6, len(terms), torch.device("cpu"))
    assert exponent == same
    assert torch.equal(one, other)
    large = sum(data * 2.0 ** (e - exponent) for data, e in terms)
    torch.testing.assert_close(one, large, rtol=1e-15, atol=1e-15)
    nothing, _ = exact_sum([], 3, 2, torch.device("cpu"))
    assert nothing.tolist() == [0, 0, 0]


def test_scores_survive_a_dead_batch() -> None:
    """A batch through which no path is open adds nothing, and does not upset the scale of the sum."""
    model = build("mlp")
    with torch.no_grad():
        model[1].weight.abs_()
    alive, dead = images().abs(), -images().abs()
    expected = px.PX().score(model, [alive])
    for name, score in px.PX().score(model, [dead, alive]).items():
        torch.testing.assert_close(score, expected[name])
