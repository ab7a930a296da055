"""Checks of the record of decisions in a configuration, which may come from an untrusted file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from . import config_checks as checks
from .config_checks import ConfigError
from .names import canonical

MAX_ENTRIES = 100  # of one kind
MAX_CURVE = 2000  # thresholds
MAX_NAME = 300
_FIELDS = {"weights", "input", "data", "operating_points", "sets", "abstentions", "patients"}
_RULES = ("sensitivity", "specificity", "youden", "cost", "prevalence", "f1")
_MOST = 10**12  # images


def decisions(found: Any, labels: Sequence[str], task: str) -> dict[str, Any]:
    """Checks a record of `medmamba.decision.Decisions.to_dict`; {} where nothing was decided.

    Args:
        labels: classes of the model, which operating points must name exactly.
        task: of the model.

    Raises:
        ConfigError: an unknown or missing field, a value of another type or out of range, counts that contradict each
            other, a class that the model does not have, or two entries of one name.
    """
    record = checks.plain(found, "decisions")
    if not record:
        return {}
    _only(record, "decisions", _FIELDS, {"input", "data"})
    if "weights" in record:
        checks.fingerprint(record["weights"], "decisions.weights")
    if not re.fullmatch(r"[0-9a-f]{16,64}", str(record["input"])):
        raise ConfigError(f"decisions.input must be a checksum, got {record['input']!r:.80}")
    _data(record["data"])
    names: set[str] = set()
    for kind, check in (("operating_points", _point), ("sets", _sets), ("abstentions", _abstention)):
        entries = record.get(kind, [])
        if not isinstance(entries, list) or len(entries) > MAX_ENTRIES:
            raise ConfigError(f"decisions.{kind} must be a list of at most {MAX_ENTRIES} entries")
        for i, entry in enumerate(entries):
            where = f"decisions.{kind}[{i}]"
            check(_object(entry, where), where, labels, task)
            name = canonical(entry["name"])
            if name in names:
                raise ConfigError(f"{where}: there are two decisions of the name {entry['name']!r}")
            names.add(name)
    if record.get("patients") is not None:
        _patients(_object(record["patients"], "decisions.patients"))
    return record


def _data(found: Any) -> None:
    data = _object(found, "decisions.data")
    _only(data, "decisions.data", {"name", "split", "images", "patients"}, {"name", "split", "images"})
    checks.text(data["name"], "decisions.data.name", 1000)
    checks.text(data["split"], "decisions.data.split", 100)
    checks.integer(data["images"], "decisions.data.images", 1, _MOST)
    if data.get("patients") is not None:
        checks.integer(data["patients"], "decisions.data.patients", 1, _MOST)


def _point(entry: dict[str, Any], where: str, labels: Sequence[str], task: str) -> None:
    _only(entry, where, {"name", "classes", "threshold", "rule", "validation", "curve"}, without={"curve"})
    _name(entry, where)
    classes = checks.several(entry["classes"], f"{where}.classes", len(labels))
    for name in classes:
        if name not in labels:
            raise ConfigError(f"{where}.classes: the model has no class {name!r:.80}; it has {', '.join(labels)}")
    if not classes or len(set(classes)) != len(classes) or (len(classes) == len(labels) > 1):
        raise ConfigError(f"{where}.classes must be some of the classes, each once, got {classes!r:.80}")
    checks.real(entry["threshold"], f"{where}.threshold", 0, 1 + 1e-6)
    rule = _object(entry["rule"], f"{where}.rule")
    _only(rule, f"{where}.rule", {"kind", "value", "margin"})
    if rule["kind"] not in _RULES:
        raise ConfigError(f"{where}.rule.kind must be one of {', '.join(_RULES)}, got {rule['kind']!r:.80}")
    if not isinstance(rule["margin"], bool):
        raise ConfigError(f"{where}.rule.margin must be true or false")
    needs = {"sensitivity": (0, 1), "specificity": (0, 1), "cost": (0, 1e12)}.get(rule["kind"])
    if needs or (rule["kind"] == "prevalence" and rule["value"] is not None):
        checks.real(rule["value"], f"{where}.rule.value", *(needs or (0, 1)))
        if rule["value"] == 0 or (rule["kind"] != "cost" and rule["value"] == 1):
            raise ConfigError(f"{where}.rule.value must be above 0{'' if rule['kind'] == 'cost' else ' and below 1'}")
    elif rule["value"] is not None:
        raise ConfigError(f"{where}.rule.value must be null for {rule['kind']}, got {rule['value']!r:.80}")
    counts = _object(entry["validation"], f"{where}.validation")
    named = {"tp", "fn", "fp", "tn"}
    _only(counts, f"{where}.validation", named | {"positives", "negatives"}, named)
    for name in named:
        checks.integer(counts[name], f"{where}.validation.{name}", 0, _MOST)
    sizes = {"positives": counts["tp"] + counts["fn"], "negatives": counts["fp"] + counts["tn"]}
    for name, size in sizes.items():
        if name in counts:
            checks.real(counts[name], f"{where}.validation.{name}", 0, size)
    if "curve" in entry:
        _curve(_object(entry["curve"], f"{where}.curve"), f"{where}.curve", sizes)


def _curve(curve: dict[str, Any], where: str, sizes: Mapping[str, int]) -> None:
    _only(curve, where, {"thresholds", "tp", "fp", "positives", "negatives", "worth"}, without={"worth"})
    lists = {name: checks.several(curve[name], f"{where}.{name}", MAX_CURVE) for name in ("thresholds", "tp", "fp")}
    length = len(lists["thresholds"])
    if not length or any(len(values) != length for values in lists.values()):
        raise ConfigError(f"{where} needs as many tp and fp as thresholds, and at least one")
    for name, size in sizes.items():
        if checks.integer(curve[name], f"{where}.{name}", 0, _MOST) != size:
            raise ConfigError(f"{where}.{name} is {curve[name]}, and the counts at the threshold add up to {size}")
    before = 2.0
    for value in lists["thresholds"]:
        if checks.real(value, f"{where}.thresholds", 0, 1 + 1e-6) >= before:
            raise ConfigError(f"{where}.thresholds must fall")
        before = value
    for name, most in (("tp", curve["positives"]), ("fp", curve["negatives"])):
        values = [checks.integer(value, f"{where}.{name}", 0, most) for value in lists[name]]
        if values != sorted(values):
            raise ConfigError(f"{where}.{name} must not fall, as the thresholds do")
    if "worth" in curve:
        pairs = checks.several(curve["worth"], f"{where}.worth", MAX_CURVE)
        if len(pairs) != length or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
            raise ConfigError(f"{where}.worth needs two numbers for each threshold")
        for pair in pairs:
            for value, most in zip(pair, (curve["positives"], curve["negatives"]), strict=True):
                checks.real(value, f"{where}.worth", 0, most + 0.01)


def _sets(entry: dict[str, Any], where: str, labels: Sequence[str], task: str) -> None:
    lists = ("thresholds", "counts", "conditional")
    numbers = {"name", "coverage", "score", "pooled", "randomised", "seed", "penalty", "rank"}
    _only(entry, where, {*numbers, *lists})
    _name(entry, where)
    checks.real(entry["coverage"], f"{where}.coverage", 1e-6, 1 - 1e-9)
    if entry["score"] not in (("lac",) if task == "multilabel" else ("lac", "aps", "raps")):
        raise ConfigError(f"{where}.score is unknown, or not for a {task} model: {entry['score']!r:.80}")
    for name in lists:
        values = checks.several(entry[name], f"{where}.{name}", len(labels))
        if len(values) != len(labels):
            raise ConfigError(f"{where}.{name} needs a value for each of the {len(labels)} classes, got {len(values)}")
        for value in values:
            if name == "thresholds":
                checks.real(value, f"{where}.{name}", -1e9, 1e9)
            elif name == "counts":
                checks.integer(value, f"{where}.{name}", 0, _MOST)
            elif not isinstance(value, bool):
                raise ConfigError(f"{where}.{name} must be true or false for each class")
    for name in ("pooled", "randomised"):
        if not isinstance(entry[name], bool):
            raise ConfigError(f"{where}.{name} must be true or false")
    checks.integer(entry["seed"], f"{where}.seed", -(2**63), 2**63 - 1)
    checks.integer(entry["rank"], f"{where}.rank", 0, checks.MAX_CLASSES)
    checks.real(entry["penalty"], f"{where}.penalty", 0, 1e6)


def _abstention(entry: dict[str, Any], where: str, labels: Sequence[str], task: str) -> None:
    _only(entry, where, {"name", "threshold", "target", "answered", "n", "errors", "confidence"})
    _name(entry, where)
    checks.real(entry["threshold"], f"{where}.threshold", -3, 2)
    target = _object(entry["target"], f"{where}.target")
    if len(target) != 1 or next(iter(target)) not in ("coverage", "risk"):
        raise ConfigError(f"{where}.target must have either coverage or risk")
    checks.real(next(iter(target.values())), f"{where}.target", 1e-9, 1 - 1e-9)
    n = checks.integer(entry["n"], f"{where}.n", 1, _MOST)
    answered = checks.integer(entry["answered"], f"{where}.answered", 0, n)
    checks.real(entry["errors"], f"{where}.errors", 0, answered)
    if entry["confidence"] is not None:
        checks.real(entry["confidence"], f"{where}.confidence", 0, 1)


def _patients(entry: dict[str, Any]) -> None:
    where = "decisions.patients"
    methods = ("mean_logit", "max", "noisy_or")
    _only(entry, where, {"method", "losses", "groups"}, {"method"})
    if entry["method"] not in methods:
        raise ConfigError(f"{where}.method must be one of {', '.join(methods)}, got {entry['method']!r:.80}")
    for name, loss in _object(entry.get("losses", {}), f"{where}.losses").items():
        if name not in methods:
            raise ConfigError(f"{where}.losses: unknown method {name!r:.80}")
        checks.real(loss, f"{where}.losses.{name}", 0, 1e6)
    if "groups" in entry:
        checks.integer(entry["groups"], f"{where}.groups", 1, _MOST)


def _name(entry: Mapping[str, Any], where: str) -> None:
    name = checks.text(entry["name"], f"{where}.name", MAX_NAME)
    if not name.strip() or any(c in "\n\r\t" for c in name):
        raise ConfigError(f"{where}.name is empty or has a line break: {name!r:.80}")


def _object(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ConfigError(f"{where} must be an object, got {found!r:.80}")
    return found


def _only(
    record: Mapping[str, Any],
    where: str,
    known: set[str],
    required: set[str] | None = None,
    without: frozenset[str] | set[str] = frozenset(),
) -> None:
    """Checks the names of fields; those required are by default all known ones apart from `without`."""
    required = known - without if required is None else required
    if unknown := sorted(set(record) - known):
        raise ConfigError(
            f"{where} has unknown fields {unknown}; it was written by a newer version of medmamba (pip install -U "
            "medmamba), or is damaged: fit it again with `medmamba decide`"
        )
    if missing := sorted(required - set(record)):
        raise ConfigError(f"{where} lacks {', '.join(missing)}; fit it again with `medmamba decide`")
