"""The metric scripts load from the package, without the network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest

from px_hf.metrics import metric_path


@pytest.fixture(scope="module")
def accuracy() -> evaluate.EvaluationModule:
    return evaluate.load(metric_path("accuracy"))


@pytest.mark.parametrize(
    ("predictions", "references", "expected"),
    [([0, 1, 1], [0, 1, 2], 2 / 3), ([3], [3], 1.0), ([1, 2], [2, 1], 0.0)],
)
def test_accuracy(
    accuracy: evaluate.EvaluationModule, predictions: list[int], references: list[int], expected: float
) -> None:
    result = accuracy.compute(predictions=np.array(predictions), references=np.array(references))
    assert result == {"accuracy": expected}


def test_accuracy_needs_as_many_references_as_predictions(accuracy: evaluate.EvaluationModule) -> None:
    with pytest.raises(ValueError, match="Mismatch in the number"):
        accuracy.compute(predictions=[0, 1], references=[0])


def test_accuracy_loads_where_every_connection_fails(tmp_path: Path) -> None:
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import evaluate\n"
        f"metric = evaluate.load({metric_path('accuracy')!r})\n"
        "print(metric.compute(predictions=[1, 0], references=[1, 1])['accuracy'])\n"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("0.5"), done.stderr
