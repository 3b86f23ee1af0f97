"""Top-1 accuracy as an `evaluate.Metric` that ships with the package: nothing is fetched or run from the Hub."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score


class Accuracy(evaluate.Metric):
    """Share of the images whose predicted class is the right one, in [0, 1].

    `compute(predictions=..., references=...)` takes class indices, both of shape (n,), and returns
    `{"accuracy": float}`. With `normalize=False` it returns the number of right predictions instead; `sample_weight`,
    shape (n,), weights the images.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of the predictions that equal the references.",
            citation="",
            inputs_description=(
                "predictions (list of int): predicted classes; references (list of int): the right classes; "
                "normalize (bool): False for the number of right ones; sample_weight (list of float)."
            ),
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://scikit-learn.org/stable/modules/generated/sklearn.metrics.accuracy_score.html"],
        )

    def _compute(self, predictions, references, normalize: bool = True, sample_weight=None) -> dict[str, float]:
        score = accuracy_score(references, predictions, normalize=normalize, sample_weight=sample_weight)
        return {"accuracy": float(score)}


def compute_metrics(eval_prediction) -> dict[str, float]:
    """For `Trainer(compute_metrics=...)`: `{"accuracy": …}` of logits (n, classes) and labels (n,).

    Where the model returns more than logits (hidden states, attentions), the logits are the first entry.
    """
    logits = eval_prediction.predictions
    if isinstance(logits, tuple):
        logits = logits[0]
    # In memory: every process of a distributed run computes this, and none needs a lock or a file for it.
    metric = Accuracy(keep_in_memory=True)
    return metric.compute(predictions=np.argmax(logits, axis=-1), references=eval_prediction.label_ids)
