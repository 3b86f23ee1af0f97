import numpy as np
import pytest
from transformers import EvalPrediction

from peft_heads.metrics.accuracy import Accuracy, compute_metrics


@pytest.fixture
def accuracy():
    return Accuracy(keep_in_memory=True)


def test_share_of_right_predictions(accuracy):
    assert accuracy.compute(predictions=[0, 1, 2, 2], references=[0, 1, 2, 0]) == {"accuracy": 0.75}


def test_options(accuracy):
    assert accuracy.compute(predictions=[0, 1], references=[0, 0], normalize=False) == {"accuracy": 1.0}
    weighted = accuracy.compute(predictions=[0, 1], references=[0, 0], sample_weight=[3.0, 1.0])
    assert weighted == {"accuracy": 0.75}


def test_batches_and_files_give_the_same(tmp_path):
    metric = Accuracy(cache_dir=str(tmp_path))
    metric.add_batch(predictions=[1, 1], references=[1, 0])
    metric.add(prediction=4, reference=4)
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}


def test_compute_metrics_takes_logits():
    logits = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    labels = np.array([1, 0, 0])
    assert compute_metrics(EvalPrediction(logits, labels)) == {"accuracy": pytest.approx(2 / 3)}
    with_hidden_states = EvalPrediction((logits, np.eye(3, 5, k=2)), labels)
    assert compute_metrics(with_hidden_states) == {"accuracy": pytest.approx(2 / 3)}
