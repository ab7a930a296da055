"""A small trained model and the squares that it tells apart."""

import functools

import numpy as np
import torch
import torch.nn.functional as F

import medmamba
from medmamba.explain import methods

METHODS = list(methods())


def squares(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dark noise with one square of 8 pixels somewhere, red (class 1) or blue (class 0): images (n, 3, 32, 32) in
    [0, 1], classes, and the upper left corners (n, 2)."""
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 3, 32, 32, generator=g) * 0.4
    classes = torch.randint(0, 2, (n,), generator=g)
    corners = torch.randint(0, 25, (n, 2), generator=g)
    for image, label, (top, left) in zip(images, classes, corners, strict=True):
        image[:, top : top + 8, left : left + 8] = 0.2
        image[0 if label else 2, top : top + 8, left : left + 8] = 1
    return images, classes, corners


@functools.cache
def train() -> medmamba.MedMamba:
    """A model that has learned the colour of the square, in a second or two."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = medmamba.create_model("test", num_classes=2, id2label={0: "blue", 1: "red"})
        images, classes, _ = squares(512, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            picked = torch.randint(0, 512, (32,))
            loss = F.cross_entropy(model(images[picked] * 2 - 1), classes[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.zero_grad(set_to_none=True)
    images, classes, _ = squares(100, 2)
    with torch.no_grad():
        assert (model.eval()(images * 2 - 1).argmax(1) == classes).float().mean() > 0.95
    return model


def picture(i: int = 0, seed: int = 3) -> np.ndarray:
    return squares(i + 1, seed)[0][i].permute(1, 2, 0).numpy()
