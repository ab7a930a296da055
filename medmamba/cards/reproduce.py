"""The section of a model card on how its weights were made."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .facts import ModelFacts

# Settings that only describe a recipe.
_NOT_SETTINGS = ("name", "description")


def how_to_reproduce(facts: ModelFacts) -> str:
    """Returns the commands that made the weights, and where they were run; empty if they are unknown."""
    t = facts.config.training
    if t.get("origin"):
        return f"`python -m hub.convert {t['origin']['file']}` with the authors' file."
    if not t.get("recipe"):
        return ""
    commands = _zoo_commands(facts)
    if not commands:
        words = ["medmamba", "train", "--data", "DATA", "--out", "OUT", "--recipe", t["recipe"]]
        if facts.entry:
            words += ["--dataset", facts.entry.name]
        words += ["--from", t["init"]] if t.get("init") else ["--variant", facts.config.architecture]
        commands = [[*words, "--seed", str(t.get("seed", 0))]]
    if changed := changed_settings(t):
        commands[-1] += ["--set", *changed]
    precision = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(str(t.get("precision")), "unrecorded")
    versions = ", ".join(f"{name} {version}" for name, version in t.get("versions", {}).items())
    lines = "\n".join(map(shlex.join, commands))
    return (
        f"```bash\n{lines}\n```\n\n"
        f"It was run on {t.get('device', 'an unrecorded device')} in {precision} precision, "
        f"{t.get('seconds', 0) / 60:.0f} minutes, with {versions or 'unrecorded versions'}. Of "
        f"{t.get('epochs')} epochs, epoch {t.get('best_epoch')} was best on validation, by "
        f"{' then '.join(t.get('selected_by', []))}. All settings are in `results.json`."
    )


def _zoo_commands(facts: ModelFacts) -> list[list[str]]:
    """Returns the commands of `hub.zoo` that train a model of one of its recipes; [] for other models."""
    t = facts.config.training
    if not facts.entry or not str(t.get("recipe")).startswith("zoo-"):
        return []
    words = ["python", "-m", "hub.zoo", "train", facts.entry.name, "--data", "DATA", "--out", "OUT"]
    words += ["--recipe", t["recipe"]] if t["recipe"] != f"zoo-{facts.entry.name}" else []
    commands = [[*words, "--seed", str(t.get("seed", 0))]]
    if t.get("base_model"):
        commands[-1] += ["--init", str(t["base_model"])]
    teaching = str(t.get("teacher", ""))
    models = re.findall(r"[\w.-]+/[\w.-]+", teaching)
    if teachers := re.match(r"(\d+) x ([\w-]+)", teaching):
        first = ["python", "-m", "hub.zoo", "baseline", facts.entry.name, "--data", "DATA", "--model", teachers[2]]
        first += ["--recipe", str(t["recipe"]).partition("-distilled")[0]]
        changed = [f"{key}={_json(value)}" for key, value in t.get("teacher_settings", {}).items()]
        first += ["--set", *changed] if changed else []
        seeds = t.get("teacher_seeds") or range(int(teachers[1]))
        commands = [
            *([*first, "--seed", str(seed), "--out", f"TEACHER-{seed}"] for seed in seeds),
            [*commands[-1], "--teacher", *(f"TEACHER-{seed}" for seed in seeds), *models],
        ]
    elif models:
        commands[-1] += ["--teacher", *models]
    if start := re.fullmatch(r"(zoo-[\w-]+), seed (\d+)", str(t.get("init"))):
        joint = start[1].startswith("zoo-joint")  # else an earlier run on the same dataset
        first = ["python", "-m", "hub.zoo", *(["pretrain"] if joint else ["train", facts.entry.name])]
        first += ["--data", "DATA", "--out", "START", "--seed", start[2]]
        commands = [first + (["--recipe", start[1]] if start[1] != "zoo-joint" else []), *commands]
        commands[-1] += ["--init", "START"]
    if facts.config.architecture != "tiny":
        for command in commands:
            command += ["--variant", facts.config.architecture]
    return commands


def changed_settings(training: dict[str, Any]) -> list[str]:
    """Returns `key=value` for every setting that differs from the named recipe."""
    from ..training.recipe import RecipeError, load_recipe

    settings = training.get("settings", {})
    try:
        base = load_recipe(training["recipe"]).to_dict()
    except (RecipeError, OSError):
        return []
    flat, flat_base = _flatten(settings), _flatten(base)
    return [
        f"{key}={_json(value)}"
        for key, value in flat.items()
        if key not in _NOT_SETTINGS and flat_base.get(key) != value
    ]


def _flatten(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()}


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
