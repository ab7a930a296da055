"""Labels and probabilities for the tests of metrics."""

import numpy as np

K = 5
NAMES = [f"class {i}" for i in range(K)]


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def example(seed: int = 0, n: int = 600, k: int = K, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns imbalanced labels and probabilities that are mostly correct."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(k, n, p=np.arange(1, k + 1) / np.arange(1, k + 1).sum())
    logits = rng.normal(size=(n, k))
    logits[np.arange(n), labels] += 1.3
    return labels, softmax(np.round(logits) if ties else logits)


def several(seed: int = 0, n: int = 500) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, K)) < (0.6, 0.3, 0.2, 0.1, 0.05)).astype(int)
    return labels, 1 / (1 + np.exp(-(rng.normal(size=(n, K)) * 1.5 + 2 * labels - 1)))
