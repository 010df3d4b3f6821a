"""Results of a downstream evaluation as people read them: a table, a Markdown page, `model-index` entries.

`results` is the content of `downstream.json`, as recipes/evaluate_downstream.py writes it:

    {"model": name, "subjects": [{"name", "kind", "sparsity"}, ...], "methods": [name, ...], "notes": [text, ...],
     "tasks": {task: {"error": text or None, "classes": int, "examples": {split: int}, "test_split": name,
                      "dataset": name, "results": {subject: {method: {"scores": {metric: Score}, ...}}}}},
     "weights_sha256": of the weights and masks of a model that was saved pruned, else None}

`kind` is "dense", "pruned" or "random" (the control).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..errors import CheckpointError

RESULTS_FILE, PAGE_FILE, FIGURE_FILE = "downstream.json", "downstream.md", "downstream.png"
REPORT_FILES = (RESULTS_FILE, PAGE_FILE, FIGURE_FILE)

METHODS = {"knn": "k-NN", "ridge": "ridge", "linear": "linear probe", "finetune": "fine-tuned"}
"""Methods by the names they have in files, and in tables."""

METRICS = {
    "accuracy": "accuracy",
    "top_5_accuracy": "top-5 accuracy",
    "macro_f1": "macro F1",
    "balanced_accuracy": "balanced accuracy",
    "calibration_error": "calibration error",
}


def accuracy_rows(results: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    """For each task its name, and for each subject its name and the cells of `results["methods"]`."""
    for task, record in sorted(results["tasks"].items()):
        if not record["error"]:
            dense = next((s["name"] for s in results["subjects"] if s["kind"] == "dense"), None)
            yield (
                task,
                [
                    (subject["name"], [_cell(record, subject["name"], dense, m) for m in results["methods"]])
                    for subject in results["subjects"]
                ],
            )


def _cell(record: Mapping[str, Any], subject: str, dense: str | None, method: str) -> str:
    """`91.2 [89.0, 93.1] 98 %`: accuracy with its interval, and the share of the dense accuracy that is kept."""
    found = record["results"].get(subject, {}).get(method)
    if found is None:
        return "-"
    score = found["scores"]["accuracy"]
    text = f"{100 * score['value']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
    ceiling = record["results"].get(dense, {}).get(method) if dense is not None and dense != subject else None
    if ceiling and ceiling["scores"]["accuracy"]["value"]:
        text += f" {100 * score['value'] / ceiling['scores']['accuracy']['value']:.0f} %"
    return text


def markdown(results: Mapping[str, Any]) -> str:
    """The page: accuracies by task, the other metrics, failures, and how all was measured."""
    methods = results["methods"]
    lines = [
        "## Downstream evaluation",
        "",
        "Test accuracy in %, with its 95 % interval; in pruned and random rows then the share of the dense model's "
        "accuracy that is kept.",
        "",
        f"![Accuracy by task]({FIGURE_FILE})",
    ]
    for task, rows in accuracy_rows(results):
        record = results["tasks"][task]
        counts = ", ".join(f"{split} {record['examples'][split]:,}" for split in ("train", "validation", "test"))
        lines += ["", f"### {task}", "", f"{record['classes']} classes; images: {counts}.", ""]
        lines += table(["", *(METHODS[m] for m in methods)], [[name, *cells] for name, cells in rows])
    failed = {task: record["error"] for task, record in sorted(results["tasks"].items()) if record["error"]}
    if failed:
        lines += ["", "### Failed", "", *(f"- **{task}**: {_escape(error)}" for task, error in failed.items())]
    lines += ["", "<details><summary>Other metrics</summary>", "", *_other_metrics(results), "", "</details>"]
    lines += ["", "### How it was measured", "", *(f"- {note}" for note in results["notes"]), ""]
    return "\n".join(lines)


def model_index(results: Mapping[str, Any]) -> list[EvalResult]:
    """Entries for a model card: all metrics of the evaluated model, `results["model"]`, by task and method.

    They are those of the subject of kind "pruned", or "dense" if there is no other; with several pruned subjects
    (pruned by the evaluation itself) there is no such model, hence no entry.
    """
    for kind in ("pruned", "dense"):
        subjects = [subject["name"] for subject in results["subjects"] if subject["kind"] == kind]
        if subjects:
            break
    if len(subjects) != 1 or results.get("pruned_here"):
        return []
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=record["dataset"],
            dataset_name=task,
            dataset_split=record["test_split"],
            metric_type=metric.replace("macro_f1", "f1"),
            metric_name=f"{METRICS[metric]} ({METHODS[method]})",
            metric_value=round(score["value"], 4),
        )
        for task, record in sorted(results["tasks"].items())
        if not record["error"]
        for method, found in sorted(record["results"].get(subjects[0], {}).items())
        for metric, score in sorted(found["scores"].items())
    ]


def read_results(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The results that lie in `folder`, or None.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = Path(folder, RESULTS_FILE)
    if not file.is_file():
        return None
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        markdown(results), model_index(results)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is damaged or not of recipes/evaluate_downstream.py ({type(error).__name__}: {error}). Remove it."
        ) from error
    return results


def _other_metrics(results: Mapping[str, Any]) -> list[str]:
    names = [name for name in METRICS if name != "accuracy"]
    rows = []
    for task, record in sorted(results["tasks"].items()):
        for subject in (subject["name"] for subject in results["subjects"]):
            for method in results["methods"]:
                scores = record["results"].get(subject, {}).get(method, {}).get("scores")
                if scores:
                    cells = [_score(scores[name]) if name in scores else "-" for name in names]
                    rows.append([task, subject, METHODS[method], *cells])
    return table(["task", "model", "method", *(METRICS[name] for name in names)], rows, left=3)


def _score(score: Mapping[str, Any]) -> str:
    text = f"{100 * score['value']:.1f}"
    return text + (f" [{100 * score['low']:.1f}, {100 * score['high']:.1f}]" if "low" in score else "")


def table(head: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    """The lines of a table in Markdown. The first `left` columns are text, the others numbers."""
    align = ["---"] * left + ["---:"] * (len(head) - left)
    return ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in (head, align, *rows)]


def _escape(text: str) -> str:
    """Text of others (names, errors) as one line without markup of its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
