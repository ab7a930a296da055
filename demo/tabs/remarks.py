"""How far to believe an answer, in plain language. Every sentence follows from a condition; tests check each."""

from __future__ import annotations

from ..advice import in_app
from ..html import NOTHING, Markup
from ..service import Answer, is_of_contrast
from ..store import Loaded

Remark = tuple[str, str, str, Markup]
"""Kind, title, text, and a button that mends it."""
SURE = 0.8
"""From this calibrated probability on, an answer gets a tick."""
ENOUGH_IMAGES = 200
"""With fewer validation images, a share of right answers is uncertain by more than seven points (95 %, at a half)."""
SMALL_ERROR = 0.05
"""Up to this expected calibration error, probabilities are told as shares of right answers."""
WINDOW_BUTTON = Markup(
    '<button type="button" class="mm-mend" data-mm-window="range">Window by the range of values</button>'
)


def remarks_of(found: Answer, loaded: Loaded) -> tuple[list[Remark], list[Remark]]:
    """(kind, title, text, button) of what stands before the answer, as it changes what that is worth, and after it."""
    before: list[Remark] = []
    if found.unusual:
        text = (
            f"Only {1 - _coverage(loaded):.0%} of its validation images looked this unusual. The probabilities mean "
            f"little here, whatever they say.{_auroc_text(loaded)}"
        )
        before.append(("warn", "This does not look like what the model was trained on", text, NOTHING))
    before += _warnings(found)
    after: list[Remark] = []
    if found.n_frames > 1:
        text = "The others may show something else. Choose another under Frame."
        after.append(("info", f"This answer is for frame {found.frame + 1} of {found.n_frames} alone", text, NOTHING))
    if loaded.config.task == "multilabel":
        if found.unsure:
            text = "None of what it knows is more probable than not, as it sees it."
            after.append(("info", "No label reaches an even chance", text, NOTHING))
    elif found.unsure:
        second = f" The runner-up is {found.prediction.top[1][0]}." if len(found.prediction.top) > 1 else ""
        after.append(("warn", "The model is unsure", how_often_right(found, loaded) + second, NOTHING))
    elif not before and loaded.calibrated:
        after.append(_sure(found, loaded))
    return before, after + _of_the_model(loaded)


def rates_are_known(loaded: Loaded) -> bool:
    """Whether "right in 80 of 100 such cases" may be said: calibrated, on enough images, with a small error left."""
    found = loaded.calibration
    return bool(loaded.calibrated and found and found.n >= ENOUGH_IMAGES and found.ece_after <= SMALL_ERROR)


def how_often_right(found: Answer, loaded: Loaded) -> str:
    """What is known of how often such an answer is right."""
    calibration = loaded.calibration
    if not loaded.calibrated or calibration is None:
        return "Its scores are not calibrated."
    if calibration.n < ENOUGH_IMAGES:
        return f"Its calibration rests on {calibration.n:,} images, too few to say how often such answers are right."
    if calibration.ece_after > SMALL_ERROR:
        return (
            f"Its probabilities were off by {100 * calibration.ece_after:.0f} points on average on validation images."
        )
    return f"On {calibration.n:,} validation images it was right in {_rate(found)} such cases."


def _rate(found: Answer) -> str:
    share = round(100 * found.prediction.probability)
    return f"about {share} of 100" if share < 100 else "more than 99 of 100"


def _sure(found: Answer, loaded: Loaded) -> Remark:
    change = "Another hospital, device or population can change that."
    if not rates_are_known(loaded):
        return (
            "info",
            "How often answers this sure are right is not known well",
            how_often_right(found, loaded),
            NOTHING,
        )
    assert loaded.calibration is not None
    kind = "good" if found.prediction.probability >= SURE else "info"
    title = f"Answers this sure were right in {_rate(found)} cases"
    return kind, title, f"By its calibration on {loaded.calibration.n:,} validation images. {change}", NOTHING


def _warnings(found: Answer) -> list[Remark]:
    """What was noted in reading the file; with a button if another window shows more."""
    remarks: list[Remark] = []
    for warning in found.warnings:
        title = in_app(warning)
        title = title[:1].upper() + title[1:]
        if found.better_window is None or not is_of_contrast(warning) or any(button for *_, button in remarks):
            remarks.append(("warn", title, "", NOTHING))
            continue
        values = (
            f" The values of the file lie between {found.values[0]:g} and {found.values[1]:g}." if found.values else ""
        )
        remarks.insert(0, ("warn", title, f"The model sees what is shown here.{values}", WINDOW_BUTTON))
    return remarks


def _of_the_model(loaded: Loaded) -> list[Remark]:
    remarks: list[Remark] = []
    ranking = "Read the scores as a ranking of the classes, not as probabilities."
    if loaded.calibration is None:
        remarks.append(("info", "This model was never calibrated", ranking, NOTHING))
    elif not loaded.calibrated:
        text = f"No temperature improved its scores on {loaded.calibration.n:,} validation images. {ranking}"
        remarks.append(("info", "This model could not be calibrated", text, NOTHING))
    if loaded.unusual is None and (loaded.calibration is None or loaded.calibration.ood is None):
        text = "It gives an answer for any picture, whatever it shows."
        remarks.append(("info", "This model cannot tell unusual images", text, NOTHING))
    return remarks


def _coverage(loaded: Loaded) -> float:
    """Share of the validation images that the warning lets pass."""
    if loaded.unusual:
        return loaded.unusual.coverage
    ood = loaded.calibration.ood if loaded.calibration else None
    return ood.coverage if ood else 1.0


def _auroc_text(loaded: Loaded) -> str:
    """How well the warning works, where that was measured."""
    measured = loaded.unusual.measured.get("auroc", {}) if loaded.unusual else {}
    values = [row["auroc"] for row in measured.values()]
    if not values:
        return " How well this warning works was not measured for this model."
    return (
        f" The warning is a heuristic: it told the model’s own test images from those of {len(values)} other datasets "
        f"with an AUROC of {min(values):.3f} or more."
    )
