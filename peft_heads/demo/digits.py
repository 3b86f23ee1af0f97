"""The demo's target task: scikit-learn's handwritten digits (real scans, 8x8 grey levels, no download)."""

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


NUM_TRAIN = 1000
LABEL_NAMES = [str(digit) for digit in range(10)]
MAX_INK = 16  # the scans' grey levels run from 0 (paper) to 16 (ink)


def grey_digits():
    """All scans: images uint8 (1797, 8, 8), bright on black, and labels (1797,)."""
    digits = load_digits()
    return np.rint(digits.images * (255 / MAX_INK)).astype(np.uint8), digits.target


def load_digits_dataset(seed=0):
    """A `DatasetDict` with splits `train` (1,000 images) and `test` (797), stratified by digit.

    Columns: `image`, a PIL image in RGB mode of 8x8 pixels with bright strokes on black (enlarging is left to the
    model's image processor), and `label`, a `ClassLabel` named "0" to "9". `seed` fixes which images fall into
    which split, and their order.
    """
    grey, labels = grey_digits()
    train, test = train_test_split(np.arange(len(grey)), train_size=NUM_TRAIN, stratify=labels, random_state=seed)
    features = Features({"image": Image(), "label": ClassLabel(names=LABEL_NAMES)})

    def split(indices):
        images = [PILImage.fromarray(grey[i]).convert("RGB") for i in indices]
        return Dataset.from_dict({"image": images, "label": labels[indices].tolist()}, features=features)

    return DatasetDict(train=split(train), test=split(test))
