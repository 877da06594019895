"""Makes digits.npz from scikit-learn's copy of the data: run it where scikit-learn and NumPy are installed."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

images, labels = load_digits(return_X_y=True)
np.savez_compressed(
    Path(__file__).with_name("digits.npz"), images=images.astype(np.uint8), labels=labels.astype(np.uint8)
)
