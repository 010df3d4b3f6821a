"""The model card of a pruned model: what it is, how it was pruned, what it costs, how to load it.

Filled from what is known and nothing else: the entry "px" of the saved `config.json`, the files that are there, the
report and the results. What nobody said is left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..downstream.page import markdown, model_index
from ..errors import InvalidArgumentError, listed
from ..masks_file import MASKS_FILE
from ..plan import SCHEDULES
from ..report import Report
from .kinds import kind_of

CARD_FILE = "README.md"
PLOT_FILE = "per_layer_sparsity.png"
TAGS = ("px-hf", "pruning", "sparse")

_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_KEEP = {
    True: "trainer = Trainer(model, ..., callbacks=[px.KeepMasks(masks)])",
    False: "handle = px.keep_masks(optimizer, model, masks)  # in any training loop",
}
"""How the masks are kept: for a model of transformers, and for one of timm alone."""
_MASKS_ROW = "SHA-256 of the masks"
_SPLITS = {"test": "test", "eval": "validation"}
_FILES = {
    "model": "dense, with the zeros",
    "sparse/": "compact: the kept weights and where they are",
    MASKS_FILE: "which weights are kept, one bit each",
}


def model_card(
    repo_id: str,
    config: Mapping[str, Any],
    files: Mapping[str, int],
    report: Report,
    *,
    results: Mapping[str, float] | None = None,
    downstream: Mapping[str, Any] | None = None,
    license: str | None = None,
    revision: str | None = None,
) -> str:
    """The text of README.md for a model that `save_pretrained` wrote.

    `config`: its `config.json`, with the entry "px". `files`: name -> size in bytes of what goes to the Hub.
    `results`: numbers by the names that Trainer gives them: `test_accuracy` or `eval_accuracy` (of a validation
    split) of the pruned model, as fractions, and the same with `dense_` in front for the unpruned one.
    `downstream`: the content of `downstream.json`, as `px_hf.downstream.page` describes it.

    Raises:
        InvalidArgumentError: a result is not a finite number.
    """
    px, results = config["px"], _checked(results or {})
    library = "timm" if "architecture" in config else "transformers"
    rows = [
        (f"{label}, {split}", key)
        for prefix, split in _SPLITS.items()
        for key, label in ((f"{prefix}_accuracy", "accuracy"), (f"{prefix}_loss", "loss"))
        if key in results
    ]
    card = ModelCard.from_template(
        _metadata(repo_id, config, library, results, downstream, license),
        template_path=str(_TEMPLATE),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        library=library,
        summary=_summary(config, px),
        results=[(label, *(_number(key, results.get(of)) for of in (f"dense_{key}", key))) for label, key in rows],
        compared=any(f"dense_{key}" in results for _, key in rows),
        downstream=markdown(downstream).rstrip() if downstream else "",
        costs=_costs(report),
        has_macs=report.macs is not None,
        files=_weights(files),
        stock_code=_stock_code(
            library, repo_id, revision, "preprocessor_config.json" in files, kind_of(config).loader
        ),
        task=kind_of(config).task,
        pipeline=library == "timm" or "preprocessor_config.json" in files,
        revision="" if revision is None else f', revision="{revision}"',
        settings=_settings(px),
        plot=PLOT_FILE if PLOT_FILE in files else None,
        prune_head=px.get("prune_head"),
        versions=", ".join(f"{name.replace('_commit', ' commit')} {_text(v)}" for name, v in px["versions"].items()),
        keep_code=_KEEP["model_type" in config],
    )  # fmt: skip
    return _signed(str(card))


def is_unedited(text: str) -> bool:
    """Whether `model_card` wrote this, and nobody changed it since."""
    body, _, _ = text.rstrip("\n").rpartition("\n")
    return _signed(body) == text.rstrip("\n") + "\n"


def is_about_others(text: str, masks_sha256: str) -> bool:
    """Whether a card, edited or not, names the masks it is about, and they are others."""
    found = re.search(rf"{_MASKS_ROW}\W+([0-9a-f]{{64}})", text)
    return found is not None and found[1] != masks_sha256


def _signed(text: str) -> str:
    """With a last line, invisible on the page, by which `is_unedited` knows the text again."""
    text = text.rstrip("\n")
    return f"{text}\n<!-- Written by px_hf, {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _metadata(
    repo_id: str,
    config: Mapping[str, Any],
    library: str,
    results: Mapping[str, float],
    downstream: Mapping[str, Any] | None,
    license: str | None,
) -> ModelCardData:
    px = config["px"]
    base, dataset = _hub_base(px), str(px.get("dataset_id") or px.get("dataset") or "")
    evaluations = [
        EvalResult(
            task_type=kind_of(config).task,
            dataset_type=dataset,
            dataset_name=str(px.get("dataset") or dataset),
            dataset_split=split,
            metric_type="accuracy",
            metric_value=results[f"{prefix}_accuracy"],
        )
        for prefix, split in _SPLITS.items()
        if f"{prefix}_accuracy" in results and dataset
    ]
    evaluations += model_index(downstream) if downstream else []
    more: dict[str, Any] = {"base_model_relation": "finetune"} if base else {}
    if evaluations:
        more |= {"model_name": repo_id.split("/")[-1], "eval_results": evaluations}
        more["metrics"] = sorted({evaluation.metric_type for evaluation in evaluations})
    return ModelCardData(
        library_name=library,
        license=license,
        pipeline_tag=kind_of(config).task,
        tags=[*TAGS],
        base_model=base,
        datasets=[px["dataset_id"]] if px.get("dataset_id") else None,
        **more,
    )


def _hub_base(px: Mapping[str, Any]) -> str | None:
    """The base model, if it is one of the Hub: a local folder has no namespace, and no commit."""
    base, revision = str(px.get("base_model") or ""), str(px.get("base_revision"))
    if not _HUB_ID.fullmatch(base):
        return None
    return base if "/" in base or re.fullmatch("[0-9a-f]{40}", revision) else None


def _summary(config: Mapping[str, Any], px: Mapping[str, Any]) -> str:
    what = config.get("architecture") or (config.get("architectures") or ["model"])[0]
    classes = config.get("num_classes") or len(config.get("id2label") or ())
    facts = [f"{kind_of(config).what} {_code(what)}"]
    if classes:
        facts.append(f"{classes:,} classes")
    if px.get("base_model"):
        base = _hub_base(px)
        facts.append("made from " + (f"[{base}](https://huggingface.co/{base})" if base else _text(px["base_model"])))
    if px.get("dataset"):
        facts.append(f"data set {_text(px['dataset'])}")
    if not px["weights_kept"] < px["weights"]:
        return f"{', '.join(facts)}. Nothing is pruned: a dense baseline."
    by = f" by {_code(px['criterion'])}" if px.get("criterion") else ""
    if _control(px):
        by += f" and then, as a control, changed ({_text(_control(px))})"
    return (
        f"{', '.join(facts)}. **{100 * px['sparsity']:.4g} %** of its prunable weights were pruned{by} with px_hf"
        f"{_while_training(px)}{_repaired(px)}: {px['weights_kept']:,} of {px['weights']:,} are left, the rest are "
        "exact zeros."
    )


def _while_training(px: Mapping[str, Any]) -> str:
    """When a network was pruned that was not pruned before it was fine-tuned."""
    if px.get("schedule") != SCHEDULES[1]:
        return ""
    rounds, until = px.get("rounds"), px.get("until")
    when = f" in {rounds} rounds" if rounds else " in rounds"
    when += f" over the first {100 * until:.4g} % of its training" if until else ""
    early = ", the last of which its training did not reach" if px.get("ended_early") else ""
    return f", while it was fine-tuned,{when}{early}"


def _repaired(px: Mapping[str, Any]) -> str:
    """How the weights that stay were changed without training."""
    if not px.get("repair"):
        return ""
    images = (px.get("calibration") or {}).get("examples")
    on = f" on {images:,} images" if isinstance(images, int) else ""
    return f", and those that stay repaired{on} ({_text(px['repair'])})"


def _control(px: Mapping[str, Any]) -> str | None:
    """How the found subnetwork was changed to compare with it, if it was."""
    control = px.get("control")
    return None if control in (None, "none") else str(control)


def _costs(report: Report) -> list[tuple[str, str, str]]:
    rows = [
        ("prunable weights", f"{report.weights:,}", f"{report.kept:,}"),
        ("all parameters", f"{report.parameters:,}", f"{report.parameters_kept:,}"),
    ]
    if report.macs is not None:
        rows.append(("MACs per image, effective", f"{report.macs:,}", f"{report.effective_macs:,}"))
    return rows


def _settings(px: Mapping[str, Any]) -> list[tuple[str, str]]:
    calibration = px.get("calibration") or {}
    base, revision, teacher = px.get("base_model"), px.get("base_revision"), px.get("distilled_from")
    known: list[tuple[str, Any]] = [
        ("control", _control(px)),
        ("masks of", px.get("masks_from")),
        ("sparsity", f"{100 * px['sparsity']:.6g} %"),
        ("rounds", px.get("rounds")),
        ("schedule", px.get("schedule")),
        ("last round after this share of training", px.get("until")),
        ("training ended before the last round", {True: "yes"}.get(px.get("ended_early"))),  # type: ignore[arg-type]
        ("repair without training", px.get("repair")),
        ("scope", px.get("scope")),
        ("least density of a layer", px.get("min_layer_density") or None),
        ("classifier head", {True: "pruned", False: "dense"}.get(px.get("prune_head"))),  # type: ignore[arg-type]
        ("calibration images", _calibration(calibration) if calibration else None),
        ("their SHA-256", calibration.get("sha256")),
        ("learnt from", {"dense": "the same network, fine-tuned dense"}.get(str(teacher), teacher)),
        ("seed", px.get("seed")),
        ("base model", f"{base}, revision {revision}" if base and revision else base),
        (_MASKS_ROW, px["masks_sha256"]),
    ]
    rows = [("criterion", _code(px["criterion"]))] if px.get("criterion") else []
    return rows + [(label, _text(value)) for label, value in known if value is not None]


def _calibration(calibration: Mapping[str, Any]) -> str:
    examples, split = calibration.get("examples"), calibration.get("split")
    of_class = calibration.get("examples_per_class")
    return (
        f"{examples}"
        + (f" of split {split}" if split else "")
        + (f", {of_class} of each class" if of_class else "")
        + (f", drawn with seed {calibration['seed']}" if "seed" in calibration else "")
    )


def _stock_code(library: str, repo_id: str, revision: str | None, has_processor: bool, loader: str) -> str:
    if library == "timm":
        at = f"@{revision}" if revision else ""
        return f'import timm\n\nmodel = timm.create_model("hf-hub:{repo_id}{at}", pretrained=True).eval()'
    more = f', revision="{revision}"' if revision else ""
    lines, names = [f'model = {loader}.from_pretrained("{repo_id}"{more})'], [loader]
    if has_processor:
        lines.append(f'processor = AutoImageProcessor.from_pretrained("{repo_id}"{more})')
        names.insert(0, "AutoImageProcessor")
    return "\n".join([f"from transformers import {', '.join(names)}", "", *lines])


def _weights(files: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """Name, size and kind of the files of weights; the shards of a large model count as one."""
    rows = []
    for start, what in _FILES.items():
        names = [name for name in sorted(files) if name.startswith(start) and name.endswith(".safetensors")]
        if names:
            shown = listed((f"`{name}`" for name in names), 1)
            rows.append((shown, _size(sum(files[name] for name in names)), what))
    return rows


def _checked(results: Mapping[str, float]) -> dict[str, float]:
    for name, value in results.items():
        if not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise InvalidArgumentError(f"The result {name!r} is {value!r}, expected a finite number.")
    return dict(results)


def _number(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if key.endswith("accuracy") else f"{value:.4f}"


def _size(size: int) -> str:
    for unit, bytes_of_it in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_of_it:
            return f"{size / bytes_of_it:.3g} {unit}"
    return f"{size} bytes"


def _text(value: Any) -> str:
    """One line that Markdown shows as it is, also inside a table."""
    return re.sub(r"([\\`*\[\]<|])", r"\\\1", " ".join(str(value).split()))


def _code(value: Any) -> str:
    """The same as code."""
    return "`" + " ".join(str(value).replace("`", "'").split()).replace("|", "\\|") + "`"
