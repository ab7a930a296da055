"""Training recipes: every setting that affects the result, in one small JSON file stored with the weights."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any


class RecipeError(ValueError):
    """Raised for a recipe that does not exist, or has unknown or invalid settings."""


POWERS = {"loss": 1.0, "loss-sqrt": 0.5}  # of the class weights, by `balance`


@dataclass(frozen=True)
class Augment:
    """Augmentation of the training images, drawn per image; off where all values are zero.

    A range is the largest change; values are drawn from it uniformly.
    """

    hflip: float = 0.0  # probability
    vflip: float = 0.0  # probability
    rot90: float = 0.0  # probability of a turn by 90, 180 or 270 degrees
    rotate: float = 0.0  # degrees, to either side
    shear: float = 0.0  # degrees, to either side, in x and in y
    translate: float = 0.0  # fraction of the side, to either side
    crop_area: tuple[float, float] = (1.0, 1.0)  # smallest and largest fraction of the image that is cropped
    crop_ratio: tuple[float, float] = (1.0, 1.0)  # smallest and largest width over height of the crop
    brightness: float = 0.0  # factor 1 - v to 1 + v
    contrast: float = 0.0  # factor 1 - v to 1 + v, about the mean of the image
    saturation: float = 0.0  # factor 1 - v to 1 + v
    hue: float = 0.0  # turns, to either side; at most 0.5
    gamma: float = 0.0  # exponent exp(-v) to exp(v)
    blur: float = 0.0  # probability; Gaussian, sigma up to 1 % of the side
    noise: float = 0.0  # largest standard deviation of Gaussian noise, in units of the full range
    erase: float = 0.0  # probability that a rectangle of 2 to 20 % of the image is filled with its mean colour
    pick: int = 0  # number of the changes above per image, as in RandAugment; 0: all; flips, rot90 and crops always

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip", "rot90", "blur", "erase"):
            _check(0 <= getattr(self, name) <= 1, f"augment.{name} is a probability, got {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation", "translate"):
            _check(0 <= getattr(self, name) < 1, f"augment.{name} must be in [0, 1), got {getattr(self, name)}")
        _check(0 <= self.hue <= 0.5, f"augment.hue is at most half a turn, got {self.hue}")
        for name in ("rotate", "shear", "gamma", "noise", "pick"):
            _check(getattr(self, name) >= 0, f"augment.{name} must not be negative, got {getattr(self, name)}")
        low, high = self.crop_area
        _check(0 < low <= high <= 1, f"augment.crop_area must be 0 < smallest <= largest <= 1, got {self.crop_area}")
        low, high = self.crop_ratio
        _check(0 < low <= high, f"augment.crop_ratio must be 0 < smallest <= largest, got {self.crop_ratio}")


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run. The same recipe, data and seed give the same weights on the same hardware.

    `batch_size` is the total batch of one optimiser step over all processes and accumulated parts, so a recipe does
    not depend on the machine.
    """

    name: str = "custom"
    description: str = ""

    # Length and size
    epochs: int = 100
    batch_size: int = 64
    size: int | None = 224  # side of the training images in pixels; None: that of the initial model
    final_epochs: int = 0  # the last epochs, trained at `final_size`; only these can be selected
    final_size: int = 224
    final_lr: float = 0.3  # their initial learning rate, as a fraction of lr; decays to min_lr again
    eval_size: int | None = None  # side of the images in validation and inference; None: that of the last epoch
    crop_mode: str | None = None  # how images are made square, see PreprocessConfig; None: that of the model

    # Optimiser
    optimizer: str = "adamw"  # "adamw", "adam" or "sgd"
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam; SGD takes the first as momentum
    weight_decay: float = 0.05
    decay_all: bool = False  # decay also norms, biases, A and D, as the published trainer does
    layer_decay: float = 1.0  # learning rate factor per block, from the classifier towards the input
    freeze: int = 0  # frozen stages, counted from the input; 4: trains the classifier only
    clip_grad: float = 0.0  # maximum gradient norm; 0: no clipping

    # Learning rate schedule, by optimiser step
    schedule: str = "cosine"  # "cosine", "step" or "constant"
    warmup_epochs: float = 0.0  # linear; at most a fifth of all epochs
    min_lr: float = 0.0  # end of the cosine, as a fraction of lr
    milestones: tuple[int, ...] = ()  # epochs at which "step" multiplies by gamma
    gamma: float = 0.1

    # Regularisation
    drop_path: float | None = None  # None: that of the model
    drop: float | None = None  # dropout before the classifier; None: that of the model
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of the Beta distribution; 0: off
    cutmix: float = 0.0
    mix_prob: float = 1.0  # fraction of the images that are mixed, if mixup or cutmix is on
    ema: float = 0.0  # decay per step of averaged weights, which are then validated and kept; 0: off
    distill: float = 0.0  # weight of a teacher's probabilities beside the labels, see `train(teacher=...)`
    # Class imbalance: "none", "loss" (class weights), "loss-sqrt" (their square roots) or "sampling".
    balance: str = "none"
    augment: Augment = field(default_factory=Augment)

    # Which epoch is selected: highest validation metric, later ones break ties; lowest for "loss"
    select: tuple[str, ...] = ("accuracy",)
    patience: int = 0  # epochs without improvement after which training stops; 0: never

    def __post_init__(self) -> None:
        if isinstance(self.augment, dict):
            object.__setattr__(self, "augment", _build(Augment, self.augment, "augment"))
        _check(self.epochs >= 1 and self.batch_size >= 1, "epochs and batch_size must be at least 1")
        _check(0 <= self.final_epochs <= self.epochs, "final_epochs must be between 0 and epochs")
        for name in ("size", "final_size", "eval_size"):
            _check(getattr(self, name) is None or getattr(self, name) >= 32, f"{name} must be at least 32")
        _choice("optimizer", self.optimizer, ("adamw", "adam", "sgd"))
        _choice("schedule", self.schedule, ("cosine", "step", "constant"))
        _choice("balance", self.balance, ("none", *POWERS, "sampling"))
        _check(self.lr > 0, f"lr must be positive, got {self.lr}")
        _check(all(0 <= b < 1 for b in self.betas), f"betas must be in [0, 1), got {self.betas}")
        _check(0 < self.layer_decay <= 1, f"layer_decay must be in (0, 1], got {self.layer_decay}")
        _check(0 <= self.min_lr <= 1 and 0 < self.final_lr <= 1, "min_lr and final_lr are fractions of lr, 0 to 1")
        _check(not (self.patience and self.final_epochs), "patience would end the run before its final epochs")
        _check(list(self.milestones) == sorted(self.milestones), "milestones must be in ascending order")
        _check(0 <= self.freeze <= 4, f"freeze counts stages, 0 to 4, got {self.freeze}")
        for name in ("label_smoothing", "ema", "drop_path", "drop"):
            value = getattr(self, name)
            _check(value is None or 0 <= value < 1, f"{name} must be in [0, 1), got {value}")
        for name in ("weight_decay", "clip_grad", "mixup", "cutmix", "patience", "warmup_epochs"):
            _check(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _check(0 <= self.distill <= 1, f"distill is a weight, 0 to 1, got {self.distill}")
        _check(0 <= self.mix_prob <= 1, f"mix_prob is a probability, got {self.mix_prob}")
        _check(len(self.select) >= 1, "select needs at least one metric")
        for metric in self.select:
            _choice("select", metric, SELECTABLE)

    def size_at(self, epoch: int) -> int:
        """Returns the side of the training images in this epoch, counted from 0."""
        if epoch >= self.final_phase:
            return self.final_size
        if self.size is None:
            raise RecipeError("the recipe leaves size to the model; set it with recipe.replace(size=...)")
        return self.size

    @property
    def final_phase(self) -> int:
        """The first epoch, counted from 0, at the final size; `epochs` if there is none."""
        return self.epochs - self.final_epochs

    def validated_at(self, epoch: int) -> int:
        """Returns the side of the validation images after this epoch: before a final phase that of training."""
        return self.size_at(epoch) if self.final_epochs and epoch < self.final_phase else self.evaluated_at

    @property
    def evaluated_at(self) -> int:
        """The side of the images in validation and inference."""
        return self.eval_size or self.size_at(self.epochs - 1)

    def replace(self, **changes: Any) -> Recipe:
        """Returns a copy with settings changed; augmentation settings are named `{"augment.hflip": 0.5}`.

        Raises:
            RecipeError: unknown setting or invalid value.
        """
        nested = {key.removeprefix("augment."): changes.pop(key) for key in list(changes) if key.startswith("augment.")}
        data = {**dataclasses.asdict(self), **changes}
        if nested:
            data["augment"] = {**dataclasses.asdict(self.augment), **nested}
        return _build(Recipe, data, "recipe")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values as in the JSON file."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


SELECTABLE = (
    "accuracy",
    "balanced_accuracy",
    "auroc",
    "f1",
    "quadratic_kappa",
    "loss",
    "dice",
    "iou",
    "map50",
    "map",
)  # from "dice" on: segmentation and detection


def recipe_names() -> list[str]:
    """Returns the names of the bundled recipes."""
    folder = resources.files("medmamba.training") / "recipes"
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


def load_recipe(recipe: str | os.PathLike | Recipe, **changes: Any) -> Recipe:
    """Loads a recipe by name or file, and changes settings.

    Raises:
        RecipeError: no such recipe, invalid JSON, unknown settings or invalid values.
    """
    if isinstance(recipe, Recipe):
        found = recipe
    else:
        path = Path(recipe)
        if path.suffix == ".json":
            if not path.is_file():
                raise RecipeError(f"no recipe file {path}; bundled recipes: {', '.join(recipe_names())}")
            text = path.read_text(encoding="utf-8")
        elif str(recipe) in recipe_names():
            text = (resources.files("medmamba.training") / "recipes" / f"{recipe}.json").read_text(encoding="utf-8")
        else:
            raise RecipeError(
                f"no recipe {str(recipe)!r}; available: {', '.join(recipe_names())}, or pass a .json file"
            )
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecipeError(f"recipe {recipe} is not valid JSON: {error}") from error
        if not isinstance(data, dict):
            raise RecipeError(f"recipe {recipe} holds {type(data).__name__}, expected an object of settings")
        found = _build(Recipe, {"name": path.stem, **data}, f"recipe {recipe}")
    return found.replace(**changes) if changes else found


def parse_setting(text: str) -> tuple[str, Any]:
    """Parses one `key=value` of the command line; the value is JSON, or text if it is not valid JSON.

    Raises:
        RecipeError: no equals sign.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set takes key=value, such as lr=1e-3 or augment.hflip=0.5, got {text!r}")
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value.strip()


def _build(cls: Any, data: dict[str, Any], what: str) -> Any:
    """Builds a dataclass from JSON values, converting each to the declared type."""
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f", did you mean {close[0]!r}?" if close else f"; known are {', '.join(hints)}"
            raise RecipeError(f"{what}: unknown setting {key!r}{hint}")
        values[key] = _convert(value, hints[key], f"{what}: {key}")
    return cls(**values)


def _convert(value: Any, hint: Any, what: str) -> Any:
    """Converts a JSON value to a type; `what` names it in error messages."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _convert(value, arguments[0], what)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _build(hint, value, what)
        raise RecipeError(f"{what} must be an object of settings, got {value!r}")
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        if arguments[-1] is not Ellipsis and len(items) != len(arguments):
            raise RecipeError(f"{what} needs {len(arguments)} values, got {value!r}")
        return tuple(_convert(item, arguments[0], what) for item in items)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and number:
        return float(value)
    if hint is int and number and value == int(value):
        return int(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise RecipeError(f"{what} must be {hint.__name__}, got {value!r}")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _check(value in allowed, f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check(good: bool, message: str) -> None:
    if not good:
        raise RecipeError(message)
