"""The corruptions of MedMNIST-C and their five severities, by dataset.

Di Salvo, Doerrich, Ledig: MedMNIST-C: Comprehensive benchmark and improved classifier robustness by simulating
realistic image corruptions, 2024, arXiv:2406.17536; the numbers are those of `medmnistc` 0.1.0 (Apache-2.0). They
were chosen for images of 224x224 pixels.
"""

from __future__ import annotations

from typing import Any

Severities = tuple[Any, ...]

SIZE = 224
"""Side of the images, in pixels, for which the severities were chosen."""

LEVELS = 5

_UP, _DOWN = (1.1, 1.2, 1.3, 1.4, 1.6), (0.9, 0.8, 0.7, 0.6, 0.4)
_JPEG = (50, 30, 15, 10, 7)
_NOISE = (0.04, 0.08, 0.12, 0.18, 0.26)
_SPECKLE = (0.05, 0.15, 0.2, 0.35, 0.45)
_IMPULSE = (0.01, 0.03, 0.06, 0.09, 0.17)
_SHOT = (60, 25, 18, 10, 5)
_BRIGHTER, _DARKER = (1.1, 1.2, 1.3, 1.4, 1.5), (0.9, 0.8, 0.7, 0.6, 0.5)

_ORGAN: dict[str, Severities] = {
    "pixelate": (0.7, 0.6, 0.5, 0.4, 0.35),
    "jpeg_compression": _JPEG,
    "gaussian_noise": (0.04, 0.08, 0.12, 0.16, 0.20),
    "speckle_noise": (0.05, 0.10, 0.20, 0.30, 0.40),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.08),
    "shot_noise": (200, 100, 50, 25, 15),
    "gaussian_blur": (11, 13, 15, 17, 21),
    "brightness_up": (1.2, 1.3, 1.4, 1.5, 1.6),
    "brightness_down": (0.8, 0.75, 0.7, 0.65, 0.60),
    "contrast_up": (1.3, 1.4, 1.6, 1.7, 1.8),
    "contrast_down": (0.8, 0.7, 0.6, 0.55, 0.5),
    "gamma_corr_up": (1.3, 1.4, 1.6, 1.8, 2.0),
    "gamma_corr_down": _DOWN,
}

PUBLISHED: dict[str, dict[str, Severities]] = {
    "pathmnist": {
        "pixelate": (0.8, 0.6, 0.4, 0.3, 0.25),
        "jpeg_compression": _JPEG,
        "defocus_blur": ((3, 0.1), (4, 0.1), (5, 0.2), (6, 0.2), (7, 0.3)),
        "motion_blur": ((5, 5), (10, 5), (15, 5), (15, 8), (15, 12)),
        "brightness_up": (1.1, 1.15, 1.2, 1.22, 1.25),
        "brightness_down": (0.85, 0.80, 0.75, 0.72, 0.70),
        "contrast_up": _UP,
        "contrast_down": (0.8, 0.7, 0.6, 0.55, 0.5),
        "saturate": (0.05, 0.10, 0.15, 0.20, 0.25),
        "stain_deposit": ((1, 24), (2, 24), (3, 24), (4, 24), (5, 32)),
        "bubble": ((7, 15), (10, 15), (12, 15), (15, 20), (17, 25)),
    },
    "bloodmnist": {
        "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
        "jpeg_compression": _JPEG,
        "defocus_blur": ((2, 0.01), (3, 0.1), (4, 0.1), (5, 0.1), (6, 0.1)),
        "motion_blur": ((3, 3), (5, 5), (10, 5), (10, 7), (10, 9)),
        "brightness_up": (1.1, 1.2, 1.3, 1.35, 1.4),
        "brightness_down": _DARKER,
        "contrast_up": (1.1, 1.15, 1.2, 1.25, 1.3),
        "contrast_down": _DARKER,
        "saturate": (0.05, 0.10, 0.15, 0.17, 0.20),
        "stain_deposit": ((1, 24), (2, 24), (3, 24), (3, 24), (3, 32)),
        "bubble": ((5, 10), (7, 10), (10, 10), (12, 12), (15, 12)),
    },
    "dermamnist": {
        "pixelate": (0.7, 0.5, 0.4, 0.3, 0.25),
        "jpeg_compression": (30, 20, 15, 10, 7),
        "gaussian_noise": _NOISE,
        "speckle_noise": _SPECKLE,
        "impulse_noise": _IMPULSE,
        "shot_noise": _SHOT,
        "defocus_blur": ((4, 0.1), (5, 0.2), (6, 0.3), (7, 0.4), (8, 0.5)),
        "motion_blur": ((10, 5), (15, 5), (15, 8), (15, 12), (20, 15)),
        # Largest factor and step of the enlargements that are averaged.
        "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        "brightness_up": _BRIGHTER,
        "brightness_down": _DARKER,
        "contrast_up": _UP,
        "contrast_down": (0.8, 0.7, 0.6, 0.5, 0.4),
        "black_corner": (1.10, 1.05, 1.00, 0.90, 0.95),  # in this order in the published code
        "characters": ((1, 6, 0.14), (2, 7, 0.15), (3, 8, 0.16), (4, 9, 0.17), (6, 10, 0.18)),
    },
    "retinamnist": {
        "pixelate": (0.8, 0.6, 0.5, 0.4, 0.35),
        "jpeg_compression": (30, 25, 20, 10, 5),
        "gaussian_noise": (0.04, 0.08, 0.12, 0.16, 0.20),
        "speckle_noise": (0.10, 0.15, 0.20, 0.25, 0.30),
        "defocus_blur": ((4, 0.1), (5, 0.2), (6, 0.3), (7, 0.4), (8, 0.5)),
        "motion_blur": ((8, 5), (15, 5), (15, 8), (15, 12), (20, 15)),
        "brightness_down": _DARKER,
        "contrast_down": _DOWN,
    },
    "tissuemnist": {
        "pixelate": (0.4, 0.3, 0.2, 0.15, 0.1),
        "jpeg_compression": (25, 20, 15, 10, 7),
        "impulse_noise": (0.01, 0.015, 0.02, 0.025, 0.03),
        "gaussian_blur": (13, 15, 17, 21, 25),
        "brightness_up": (1.3, 1.4, 1.5, 1.6, 1.7),
        "brightness_down": (0.8, 0.7, 0.6, 0.5, 0.4),
        "contrast_up": _UP,
        "contrast_down": _DOWN,
    },
    "octmnist": {
        "pixelate": (0.3, 0.25, 0.2, 0.15, 0.1),
        "jpeg_compression": (30, 15, 10, 7, 5),
        "speckle_noise": (0.15, 0.30, 0.40, 0.50, 0.60),
        "defocus_blur": ((0.5, 0.6), (1, 0.5), (1.5, 0.1), (2.0, 0.5), (2.5, 0.1)),
        "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "contrast_down": (0.6, 0.4, 0.3, 0.2, 0.15),
    },
    "breastmnist": {
        "pixelate": (0.3, 0.25, 0.2, 0.15, 0.1),
        "jpeg_compression": _JPEG,
        "speckle_noise": (0.10, 0.15, 0.20, 0.25, 0.30),
        "motion_blur": ((5, 5), (9, 7), (9, 10), (13, 10), (17, 12)),
        "brightness_up": (1.4, 1.5, 1.6, 1.8, 2.0),
        "brightness_down": (0.55, 0.5, 0.45, 0.4, 0.3),
        "contrast_down": _DOWN,
    },
    "chestmnist": {
        "pixelate": (0.3, 0.25, 0.2, 0.15, 0.1),
        "jpeg_compression": _JPEG,
        "gaussian_noise": _NOISE,
        "speckle_noise": _SPECKLE,
        "impulse_noise": _IMPULSE,
        "shot_noise": _SHOT,
        "gaussian_blur": (3, 5, 7, 9, 11),
        "brightness_up": _BRIGHTER,
        "brightness_down": _DARKER,
        "contrast_up": _UP,
        "contrast_down": _DOWN,
        "gamma_corr_up": _UP,
        "gamma_corr_down": _DOWN,
    },
    "pneumoniamnist": {
        "pixelate": (0.8, 0.7, 0.6, 0.5, 0.4),
        "jpeg_compression": _JPEG,
        "gaussian_noise": (0.04, 0.05, 0.06, 0.07, 0.08),
        "speckle_noise": (0.05, 0.07, 0.10, 0.15, 0.20),
        "impulse_noise": (0.005, 0.01, 0.013, 0.017, 0.02),
        "shot_noise": (300, 200, 150, 100, 80),
        "gaussian_blur": (3, 5, 7, 9, 11),
        "brightness_up": _BRIGHTER,
        "brightness_down": _DARKER,
        "contrast_up": _UP,
        "contrast_down": _DOWN,
        "gamma_corr_up": _UP,
        "gamma_corr_down": _DOWN,
    },
    "organamnist": _ORGAN,
    "organcmnist": _ORGAN,
    "organsmnist": _ORGAN,
}

GREY = {
    "tissuemnist",
    "octmnist",
    "breastmnist",
    "chestmnist",
    "pneumoniamnist",
    "organamnist",
    "organcmnist",
    "organsmnist",
}
"""Datasets of grey images: their corrupted images are made grey again."""

NEAREST = {
    "pad-ufes-20": "dermamnist",
    "pad_ufes_20": "dermamnist",
    "cpn-xray": "pneumoniamnist",
    "cpn_xray": "pneumoniamnist",
    "cervical-us": "breastmnist",
    "fetal-planes-db": "breastmnist",
}
"""Datasets that MedMNIST-C does not have, and the one of the same modality whose corruptions are taken."""


def published_for(dataset: str) -> str:
    """Returns the dataset of MedMNIST-C whose corruptions apply to a dataset of the registry.

    Raises:
        ValueError: there is none for its modality; the message lists those there are.
    """
    name = NEAREST.get(dataset, dataset)
    if name not in PUBLISHED:
        raise ValueError(
            f"MedMNIST-C has no corruptions for {dataset or 'these data'!r}; name the dataset with the most similar "
            f"images (corruptions=...): {', '.join(PUBLISHED)}"
        )
    return name
