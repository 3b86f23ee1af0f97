"""Linear probe of the demo model on the digits: does the pre-training matter?

The probe is a logistic regression (scikit-learn's default L2 penalty, C=1) on the frozen model's CLS feature after the
final layer norm, which is what the classifier of `ViTForImageClassification` sees. Features are standardised with the
training split's mean and standard deviation. The same probe is run on the shipped weights and on the same architecture
with random weights (its default initialisation).

    python scripts/probe.py
"""

import argparse

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from peft_heads.demo.digits import load_digits_dataset
from peft_heads.demo.model import DEMO_MODEL_PATH, load_demo_model, load_demo_processor


RANDOM_SEEDS = (0, 1, 2)


def load_pixels(processor):
    """Return the digits as {split: (pixels (n, 3, 32, 32), labels (n,))}."""
    return {
        name: (processor(split[:]["image"], return_tensors="pt")["pixel_values"], np.array(split["label"]))
        for name, split in load_digits_dataset().items()
    }


@torch.no_grad()
def cls_features(model, pixels, batch_size=256):
    """Return the CLS features (n, hidden_size), float32."""
    model.eval()
    batches = [model.vit(pixel_values=batch).last_hidden_state[:, 0] for batch in pixels.split(batch_size)]
    return torch.cat(batches).numpy()


def logistic_probe(train, test):
    """Return the test accuracy of a logistic regression; `train` and `test` are (standardised features, labels)."""
    return LogisticRegression(max_iter=2000).fit(*train).score(*test)


def linear_layer_probe(train, test, epochs=100, batch_size=64, learning_rate=1e-2):
    """Return the test accuracy of a linear layer trained with AdamW and no penalty, as a second opinion."""
    features, labels = (torch.as_tensor(part) for part in train)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layer = torch.nn.Linear(features.shape[1], 10)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=learning_rate, weight_decay=0.0)
        for _ in range(epochs):
            for batch in torch.randperm(len(labels)).split(batch_size):
                loss = torch.nn.functional.cross_entropy(layer(features[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    with torch.no_grad():
        predicted = layer(torch.as_tensor(test[0])).argmax(dim=1).numpy()
    return float((predicted == test[1]).mean())


def probe_accuracy(model, pixels, probe=logistic_probe):
    """Return the test accuracy of `probe` on the frozen `model`; `pixels` come from `load_pixels`."""
    scaler = StandardScaler()
    train = scaler.fit_transform(cls_features(model, pixels["train"][0])), pixels["train"][1]
    test = scaler.transform(cls_features(model, pixels["test"][0])), pixels["test"][1]
    return probe(train, test)


def compare(path=DEMO_MODEL_PATH, probe=logistic_probe):
    """Return test accuracies {"shipped": float, "random": [float per seed], "gap": shipped - mean of random}."""
    pixels = load_pixels(load_demo_processor(path))
    shipped = probe_accuracy(load_demo_model(path=path), pixels, probe)
    random = [
        probe_accuracy(load_demo_model(random_weights=True, seed=seed, path=path), pixels, probe)
        for seed in RANDOM_SEEDS
    ]
    return {"shipped": shipped, "random": random, "gap": shipped - float(np.mean(random))}


def report(path=DEMO_MODEL_PATH):
    """Return lines of text: the accuracies of both probes in per cent, and the gap in percentage points."""
    lines = []
    for name, probe in [("logistic regression", logistic_probe), ("linear layer, AdamW", linear_layer_probe)]:
        result = compare(path, probe)
        random = ", ".join(f"{accuracy:.1%}" for accuracy in result["random"])
        lines.append(
            f"{name}: pre-trained {result['shipped']:.1%}, random weights {random} (seeds {', '.join(map(str, RANDOM_SEEDS))}), "
            f"gap to their mean {100 * result['gap']:.1f} points"
        )
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=DEMO_MODEL_PATH, help="folder of the model (default: the shipped one)")
    print("\n".join(report(parser.parse_args(argv).model)))


if __name__ == "__main__":
    main()
