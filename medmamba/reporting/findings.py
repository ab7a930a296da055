"""Sections of a report beyond performance: subgroups, corrupted images, unusual images, explanations, errors."""

from __future__ import annotations

import math

from ..explain.faithfulness import Trust
from ..metrics.result import TITLES
from .blocks import Block, Bullets, Table, Text, picture
from .figures import corruption_figure, gallery, score_figure, subgroup_figure
from .study import Study, true_classes, wrong_first

_GALLERY = 8


def subgroups(study: Study) -> list[Block]:
    found = study.scored.subgroups
    if found is None:
        return []
    blocks: list[Block] = [
        Text(
            "Each group is scored as the whole set is. It is compared with random groups of the same images with as "
            "many patients of each class, so that neither its size nor its mix of classes makes it look different. "
            f"{found.summary()}"
        ),
        picture(
            subgroup_figure(found, study.scored.evaluation),
            "Groups with their intervals; dashed: all images. Grey: a group with few images, or few of a class.",
            100,
        ),
    ]
    for column in found.columns:
        header, rows = found.rows(column)
        gaps = [f"{TITLES[name]} {gap:.3f}" for name, gap in found.gaps[column].items() if not math.isnan(gap)]
        blocks.append(Table(header, rows, f"By {column}", small=True))
        if gaps:
            blocks.append(Text(f"Largest gap between groups of at least 30 images: {', '.join(gaps)}."))
        warnings = [f"{group.name}: {text}" for group in found.of(column) for text in group.warnings]
        if warnings:
            blocks += [Text("* Unreliable:"), Bullets(warnings)]
    return blocks


def corruptions(study: Study) -> list[Block]:
    found = study.corruptions
    if found is None:
        return []
    where = "" if study.scored.corruptions else " Stored with the model: test images of its own dataset."
    caption = "Balanced error by kind and severity of corruption."
    return [Text(found.sentence() + where), picture(corruption_figure(found), caption, 78)]


def flagged_text(study: Study) -> str:
    detector = study.model.unusual
    if detector is None:
        return ""
    flagged = detector.is_unusual(study.signatures)
    expected = 1 - detector.coverage
    return (
        f"{int(flagged.sum())} of {len(flagged)} images ({flagged.mean():.1%}) are flagged as unlike the training "
        f"images; {expected:.0%} of the validation images were."
    )


def unusual(study: Study) -> list[Block]:
    detector = study.model.unusual
    if detector is None:
        return []
    blocks: list[Block] = [
        Text(
            "An image is flagged as unusual if its pixels and features are less like those of the training images "
            f"than those of {detector.coverage:.0%} of the validation images are. {flagged_text(study)} An image that "
            "is not flagged may still belong to none of the classes."
        )
    ]
    flagged, e = detector.is_unusual(study.signatures), study.scored.evaluation
    if e.task != "multilabel" and flagged.any() and not flagged.all():
        right = study.probabilities.argmax(axis=1) == study.index.labels
        blocks.append(
            Text(
                f"Of the flagged images {right[flagged].mean():.1%} are classified correctly, of the others "
                f"{right[~flagged].mean():.1%}."
            )
        )
    stored = detector.reference.scores if detector.reference else None
    drawn = score_figure(stored, detector.score(study.signatures), detector.threshold)
    blocks.append(picture(drawn, "Distance to the training images.", 70))
    if rows := detector.measured.get("auroc"):
        cells = [
            [name, str(row["n"]), f"{row['called_unusual']:.1%}", f"{row['auroc']:.3f}"] for name, row in rows.items()
        ]
        header = ["Images of another kind", "Number", "Flagged", "AUROC"]
        blocks.append(Table(header, cells, "Measured when the model was made: images of other datasets"))
    return blocks


def explanations(study: Study) -> list[Block]:
    if not study.explained:
        return []
    blocks: list[Block] = [
        Text(
            "A map shows what influenced the output of this model, not where a disease is. Each map is checked: "
            "whether it explains how the output changes (infidelity), whether it is stable (max-sensitivity), whether "
            "removing what it marks changes the output more than removing at random (deletion, insertion), and whether "
            "it depends on what the model learned (random weights). A map that fails the last check must not be used."
        )
    ]
    for title, comparison in study.explained:
        blocks.append(picture(comparison.figure(), title[:1].upper() + title[1:] + ".", 100))
        header = ["Check", *(trust.method for trust in comparison.trust), "Good"]
        by_check = [trust.rows() for trust in comparison.trust]
        rows = []
        for i, (check, _, good) in enumerate(by_check[0]):
            if "random order" in good:  # a reference of its own for each map
                rows.append([check, *(f"{found[i][1]}; random {found[i][2].split(', ')[1]}" for found in by_check)])
                rows[-1].append(f"{good.split(' ')[0]} random")
            else:
                rows.append([check, *(found[i][1] for found in by_check), good.split(":")[0]])
        blocks.append(Table(header, rows))
        verdicts = [f"{trust.method}: {_verdict(trust)}" for trust in comparison.trust]
        blocks.append(Bullets(verdicts))
    return blocks


def _verdict(trust: Trust) -> str:
    """Returns in words which checks a map passed."""
    said = []
    if trust.randomisation:
        said.append(f"{'passed' if trust.randomisation.passed else 'FAILED'} the check with random weights")
    if curves := trust.curves:
        better = curves.deletion_auc < curves.random_deletion_auc[0]
        said.append(f"deletion {'better' if better else 'NOT better'} than a random order")
        better = curves.insertion_auc > curves.random_insertion_auc[0]
        said.append(f"insertion {'better' if better else 'NOT better'} than a random order")
    return "; ".join(said) + "."


def failures(study: Study) -> list[Block]:
    e, wrong = study.scored.evaluation, wrong_first(study)
    if not len(wrong):
        return []
    p = study.probabilities
    text = f"{len(wrong)} of {e.n_images} images are misclassified. Below are those with the highest confidence."
    blocks: list[Block] = [Text(text)]
    if e.task != "multilabel":
        pairs: dict[tuple[int, int], int] = {}
        for row in wrong:
            pair = (int(study.index.labels[row]), int(p[row].argmax()))
            pairs[pair] = pairs.get(pair, 0) + 1
        most = sorted(pairs.items(), key=lambda item: -item[1])[:6]
        rows = [[e.classes[a], e.classes[b], str(n), f"{n / e.per_class[a].support:.1%}"] for (a, b), n in most]
        header = ["True class", "Predicted", "Images", "Of the true class"]
        blocks.append(Table(header, rows, "Most frequent confusions"))
    shown = []
    for row in wrong[:_GALLERY]:
        said = e.classes[int(p[row].argmax())]
        text = f"true: {_short(true_classes(study, int(row)))}\npredicted: {_short(said)}\n{p[row].max():.0%}"
        shown.append((study.image(int(row)).pixels, text))
    blocks.append(picture(gallery(shown), "The most confident errors.", 100))
    return blocks


def _short(text: str) -> str:
    return text if len(text) <= 26 else text[:25] + "…"
