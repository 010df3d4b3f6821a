"""What each process of `test_sharded.py` runs under torchrun: `fully_shard`, prune, train, save."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from networks import build, images
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import px_hf as px

BATCHES = [images(2), images(2, seed=2), images(1, seed=3)]

PRUNED: list[tuple[str, str, str]] = [  # network, criterion, settings of px.prune
    ("hf vit", "px.PX('active', power=0.25)", "rounds=2"),
    ("hf resnet", "px.PX()", "rounds=2, min_layer_density=0.05"),
    ("hf vit", "px.Magnitude()", ""),
    ("hf vit", "px.LAMP()", "scope='layer'"),
    ("hf vit", "px.Random(seed=3)", "scope='2:4'"),
    ("timm resnet", "px.Magnitude()", ""),
]


def pruned(name: str, criterion: str, settings: str, model: nn.Module | None = None) -> tuple[nn.Module, px.Masks]:
    model = build(name) if model is None else model
    masks = eval(f"px.prune(model, BATCHES, {criterion}, sparsity=0.7, progress=False, {settings})")
    return model, masks


def shard(model: nn.Module) -> nn.Module:
    """As users do: blocks first, then the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules()):
        if type(module).__name__ in ("ViTLayer", "ResNetStage", "BasicBlock"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    model.train()
    for step in range(steps):
        logits = model(images(4, seed=100 + step))
        nn.functional.cross_entropy(logits.logits if hasattr(logits, "logits") else logits, torch.arange(4)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except px.PxError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def zeros_kept(folder: Path, facts: dict[str, object]) -> None:
    """`keep_masks` with masks that are sharded, and whole; AdamW's decay and momentum; what is saved."""
    model = shard(build("hf vit"))
    model, masks = pruned("hf vit", "px.Magnitude()", "", model)
    assert isinstance(masks, px.ShardedMasks)
    whole = masks.whole()
    facts["equal"] = [masks == whole, whole == masks, masks == px.ShardedMasks.of(whole, masks._shards)]
    facts["fingerprint"] = masks.fingerprint() == whole.fingerprint()
    facts["held"] = [sum(part.numel() for part in masks.parts.values()), masks.total]
    facts["revived before"] = bool(masks.revived(model))
    masks.apply_(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    handle = px.keep_masks(optimizer, model, masks)
    facts["bits"] = sum(bits.numel() for bits in handle._kept_bits.values())
    before = model.vit.layers[0].mlp.fc1.weight.full_tensor().clone() if hasattr(model.vit, "layers") else None
    train(model, optimizer)
    facts["revived"] = [masks.revived(model), whole.revived(model)]
    if before is not None:
        facts["moved"] = not torch.equal(before, model.vit.layers[0].mlp.fc1.weight.full_tensor())
    states = [
        int(value.to_local()[~masks.part(name, parameter)].count_nonzero())
        for name, parameter in masks.match(model).items()
        for key, value in optimizer.state[parameter].items() if key.startswith("exp_avg")
    ]  # fmt: skip
    facts["optimizer states of pruned weights"] = [len(states) > 0, sum(states)]
    facts["report"] = px.report(model, masks).sparsity == masks.sparsity
    px.save_pretrained(model, masks, folder / "saved", provenance={"criterion": "magnitude"})
    masks.save(folder / "masks.safetensors")
    state = {name: value.full_tensor() for name, value in model.state_dict().items()}
    if dist.get_rank() == 0:
        torch.save(state, folder / "trained.pt")
    handle.remove()
    train(model, optimizer, 1)
    facts["revived without"] = bool(whole.revived(model))  # the test can fail
    facts["not masked"] = message(lambda: px.save_pretrained(model, masks, folder / "not"))


def whole_masks(folder: Path, facts: dict[str, object]) -> None:
    """Masks made before sharding, by Accelerate's plugin, which on a CPU has to be told that it may."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    model, masks = pruned("hf vit", "px.LAMP()", "")
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    facts["accelerate shards"] = all(hasattr(p, "placements") for p in masks.match(model).values())
    with px.keep_masks(optimizer, model, masks):
        train(model, optimizer)
        facts["revived, accelerate"] = masks.revived(model)
    train(model, optimizer, 1)
    facts["revived without, accelerate"] = bool(masks.revived(model))


def refused(folder: Path, facts: dict[str, object]) -> None:
    model = shard(build("mlp"))
    masks = px.prune(model, BATCHES, px.Magnitude(), sparsity=0.5, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    whole = build("mlp")
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 8 + dist.get_rank()), nn.Linear(8 + dist.get_rank(), 5))
    flat = shard(build("mlp"))
    with torch.no_grad():
        flat[1].weight.to_local().fill_(float("nan") if dist.get_rank() else 0.0)
    facts["refused"] = {
        "structured": message(lambda: px.prune(model, BATCHES, px.PX(), sparsity=0.5, scope="structured")),
        "reconstruct": message(lambda: px.reconstruct_(model, masks.whole(), BATCHES)),
        "tune_only": message(lambda: px.tune_only(optimizer, model, masks.whole())),
        "gradual": message(
            lambda: px.gradual_pruning(optimizer, model, BATCHES, px.PX(), sparsity=0.5, total_steps=99)
        ),
        "score": message(lambda: px.PX().score(model, BATCHES)),
        "whole model": message(lambda: masks.apply_(whole)),
        "single mask": message(lambda: masks["1.weight"]),
        "no library": message(lambda: px.save_pretrained(model, masks, folder / "mlp")),
        "different models": message(lambda: px.prune(shard(other), BATCHES, px.PX(), sparsity=0.5)),
        "nan": message(lambda: px.prune(flat, BATCHES, px.PX(), sparsity=0.5)),
    }


def main(folder: Path, jobs: list[str]) -> None:
    facts: dict[str, object] = {}
    rank = dist.get_rank()
    for job in jobs:
        if job.isdigit():
            name, criterion, settings = PRUNED[int(job)]
            before = {key: value.clone() for key, value in build(name).state_dict().items()}
            model, masks = pruned(name, criterion, settings, shard(build(name)))
            after = {
                key: getattr(value, "full_tensor", lambda value=value: value)()
                for key, value in model.state_dict().items()
            }
            facts[f"untouched {job}"] = all(torch.equal(before[key], value) for key, value in after.items())
            train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)  # FSDP's hooks are back
            masks.save(folder / f"{job}.safetensors")
        else:
            globals()[job](folder, facts)
        gc.collect()
    (folder / f"facts {rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    px.distributed.processes()
    main(Path(sys.argv[1]), sys.argv[2:])
    gc.collect()
    dist.destroy_process_group()
