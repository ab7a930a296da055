"""Training: `medmamba.train(...)` and `medmamba train`.

recipe      every setting that affects a result, from a small JSON file
identity    inputs of a run             setup          decoded images, model
sampling    order of the images         augment        augmentation, mixup, cutmix
loss        classification loss         optim          optimiser, schedule, averaged weights
trainer     the loop                    graphed_step   a batch as one CUDA graph
teacher     distillation from a trained model
validation  selection of the epoch      data_parallel  several processes
progress    position of a run           checkpoint     stop and resume
run_log     progress bar, history       record         provenance of the weights
task        one run, for any task       finalise       calibration, test, the model folder
run         `train`, for classifiers    dense          what segmentation and detection share
"""

from .checkpoint import ResumeError
from .divergence import TrainingError
from .recipe import Augment, Recipe, RecipeError, load_recipe, recipe_names
from .run import train
from .task import TrainResult

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
