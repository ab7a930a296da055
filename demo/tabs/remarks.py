"""Plain-language remarks on how reliable a prediction is. Each has an explicit condition, covered by tests."""

from __future__ import annotations

from medmamba.serving.record import is_of_contrast

from ..advice import in_app
from ..html import NOTHING, Markup
from ..service import Answer
from ..store import Loaded

Remark = tuple[str, str, str, Markup]
"""Kind, title, text, and a button that resolves it."""
SURE = 0.8
"""Calibrated probability from which a prediction gets a check mark."""
ENOUGH_IMAGES = 200
"""With fewer validation images, an accuracy of 50 % is uncertain by more than seven points (95 % interval)."""
SMALL_ERROR = 0.05
"""Expected calibration error up to which probabilities are presented as frequencies."""
WINDOW_BUTTON = Markup('<button type="button" class="mm-mend" data-mm-window="range">Use the full value range</button>')


def remarks_of(found: Answer, loaded: Loaded) -> tuple[list[Remark], list[Remark]]:
    """Returns the remarks shown before the prediction (they affect how reliable it is), and those after it."""
    before: list[Remark] = []
    if found.unusual:
        share = f"{1 - _coverage(loaded):.0%}"
        text = (
            f"Only {share} of the model’s validation images were this unusual (out of distribution). Do not rely on "
            f"the probabilities below.{_auroc_text(loaded)}"
        )
        before.append(("warn", "This image does not look like the training images", text, NOTHING))
    before += _warnings(found)
    after: list[Remark] = []
    if found.n_frames > 1:
        text = "Other frames may give other results. Choose one under Frame."
        after.append(
            ("info", f"This prediction is for frame {found.frame + 1} of {found.n_frames} only", text, NOTHING)
        )
    if loaded.config.task == "multilabel":
        if found.unsure:
            text = "No label is above its threshold, which was chosen on validation images (0.5 where none was)."
            after.append(("info", "The model finds none of its labels", text, NOTHING))
    elif found.unsure:
        second = (
            f" The second most likely class is {found.prediction.top[1][0]}." if len(found.prediction.top) > 1 else ""
        )
        # A rate measured on validation images says nothing about an image unlike them.
        rate = "" if found.unusual else how_often_right(found, loaded)
        after.append(("warn", "The model is unsure", (rate + second).strip(), NOTHING))
    elif not before and loaded.calibrated:
        after.append(_sure(found, loaded))
    return before, after + _of_the_model(loaded)


def rates_are_known(loaded: Loaded) -> bool:
    """Whether probabilities can be presented as frequencies: calibrated on enough images, with a small error left."""
    found = loaded.calibration
    return bool(loaded.calibrated and found and found.n >= ENOUGH_IMAGES and found.ece_after <= SMALL_ERROR)


def how_often_right(found: Answer, loaded: Loaded) -> str:
    """Describes how often such predictions are correct."""
    calibration = loaded.calibration
    if not loaded.calibrated or calibration is None:
        return "Its scores are not calibrated."
    if calibration.n < ENOUGH_IMAGES:
        return f"Calibrated on only {calibration.n:,} images, too few to say how often such predictions are correct."
    if calibration.ece_after > SMALL_ERROR:
        return (
            f"On validation images, its probabilities were off by {100 * calibration.ece_after:.0f} points on average."
        )
    return f"Calibrated on {calibration.n:,} validation images: such predictions were correct in {_rate(found)} cases."


def _rate(found: Answer) -> str:
    share = round(100 * found.prediction.probability)
    return f"about {share} of 100" if share < 100 else "more than 99 of 100"


def _sure(found: Answer, loaded: Loaded) -> Remark:
    change = "This may differ for another hospital, device or population."
    if not rates_are_known(loaded):
        return (
            "info",
            "The accuracy of predictions this confident is not well known",
            how_often_right(found, loaded),
            NOTHING,
        )
    assert loaded.calibration is not None
    kind = "good" if found.prediction.probability >= SURE else "info"
    title = f"Predictions this confident were correct in {_rate(found)} cases"
    return kind, title, f"Based on its calibration on {loaded.calibration.n:,} validation images. {change}", NOTHING


def _warnings(found: Answer) -> list[Remark]:
    """Returns warnings from reading the file, with a button if another window shows more of it."""
    remarks: list[Remark] = []
    for warning in found.warnings:
        title = in_app(warning)
        title = title[:1].upper() + title[1:]
        if found.better_window is None or not is_of_contrast(warning) or any(button for *_, button in remarks):
            remarks.append(("warn", title, "", NOTHING))
            continue
        values = (
            f" The values in the file range from {found.values[0]:g} to {found.values[1]:g}." if found.values else ""
        )
        remarks.insert(0, ("warn", title, f"The model sees the image as shown here.{values}", WINDOW_BUTTON))
    return remarks


def _of_the_model(loaded: Loaded) -> list[Remark]:
    remarks: list[Remark] = []
    ranking = "Use the scores to rank the classes, not as probabilities."
    if loaded.calibration is None:
        remarks.append(("info", "This model is not calibrated", ranking, NOTHING))
    elif not loaded.calibrated:
        text = (
            f"Temperature scaling did not improve its scores on {loaded.calibration.n:,} validation images. {ranking}"
        )
        remarks.append(("info", "This model could not be calibrated", text, NOTHING))
    if loaded.unusual is None and (loaded.calibration is None or loaded.calibration.ood is None):
        text = "It predicts one of its classes for any image, whatever it shows."
        remarks.append(("info", "This model does not detect out-of-distribution images", text, NOTHING))
    return remarks


def _coverage(loaded: Loaded) -> float:
    """Returns the fraction of validation images without an out-of-distribution warning."""
    if loaded.unusual:
        return loaded.unusual.coverage
    ood = loaded.calibration.ood if loaded.calibration else None
    return ood.coverage if ood else 1.0


def _auroc_text(loaded: Loaded) -> str:
    """Describes the measured performance of the warning."""
    measured = loaded.unusual.measured.get("auroc", {}) if loaded.unusual else {}
    if not measured:
        return " The performance of this warning was not measured for this model."
    shares = [row["called_unusual"] for row in measured.values()]
    found = f"{min(shares):.0%} to {max(shares):.0%}" if min(shares) < max(shares) else f"{min(shares):.0%}"
    return (
        f" The warning is a heuristic: it flagged {found} of the images of {len(shares)} other dataset"
        f"{'s' if len(shares) > 1 else ''}. It does not "
        "notice an unknown disease in an image of the usual kind."
    )
