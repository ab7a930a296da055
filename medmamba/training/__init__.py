"""Training: `medmamba.train(...)` and `medmamba train`.

recipe      every setting that decides a result, from a small JSON file
sampling    which image comes when      augment     what is done to it      objective   the loss
optim       groups, learning rate, averaged weights
engine      the loop                    checkpoint  where it stands         log         what it tells
setup       device, data, model         finish      calibration, test, the model folder
run         `train`, which puts these together
"""

from .checkpoint import ResumeError
from .recipe import Augment, Recipe, RecipeError, load_recipe, recipe_names
from .run import TrainResult, train
from .trainer import TrainingError

__all__ = [
    "Augment",
    "Recipe",
    "RecipeError",
    "ResumeError",
    "TrainResult",
    "TrainingError",
    "load_recipe",
    "recipe_names",
    "train",
]
