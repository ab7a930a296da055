"""Which items of TRIPOD+AI and CLAIM a report covers, and which its authors have to supply.

TRIPOD+AI: Collins et al., BMJ 2024;385:e078378, doi:10.1136/bmj-2023-078378 (CC BY 4.0): 27 items, 52 with sub-items.
CLAIM, 2024 update: Tejani et al., Radiology: Artificial Intelligence 2024;6(4):e240300, doi:10.1148/ryai.240300: 44
items. The texts here are short paraphrases; the numbers are those of the checklists.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

SOURCES = {
    "TRIPOD+AI": "Collins et al., BMJ 2024;385:e078378, doi:10.1136/bmj-2023-078378",
    "CLAIM": "Tejani et al., Radiology: Artificial Intelligence 2024;6(4):e240300, doi:10.1148/ryai.240300",
}
REPORTED, PARTLY, MISSING, STATED = "reported", "partly", "not covered", "stated by the authors"

# number: (topic, sections that report it, what is missing where it is not all). No sections: the authors' to supply.
_Item = tuple[str, tuple[str, ...], str]

TRIPOD: dict[str, _Item] = {
    "1": ("Title: prediction model, population, outcome", ("model",), "the target population is the authors' to name"),
    "2": ("Abstract", ("summary",), "results only, not a structured abstract"),
    "3a": ("Healthcare context and rationale", (), ""),
    "3b": ("Target population, purpose, users", ("model",), "intended and excluded use only"),
    "3c": ("Known health inequalities", (), ""),
    "4": ("Objectives: development or evaluation", ("summary",), ""),
    "5a": ("Sources of the data, representativeness", ("data",), "sources only, representativeness is not judged"),
    "5b": ("Dates of the data", (), ""),
    "6a": ("Setting and centres", (), ""),
    "6b": ("Eligibility", (), ""),
    "6c": ("Treatments", (), ""),
    "7": ("Preparation and quality checks of the data", ("data",), "not by sociodemographic group"),
    "8a": ("Outcome and its assessment", ("model",), "the classes only, not how they were assessed"),
    "8b": ("Assessors of the outcome", (), ""),
    "8c": ("Blinding of the outcome", (), ""),
    "9a": ("Choice of predictors", ("model",), ""),
    "9b": ("Definition of predictors", ("model",), "the image and its preprocessing, not its acquisition"),
    "9c": ("Assessors of predictors", (), ""),
    "10": ("Sample size and its justification", ("data",), "sizes only, no justification"),
    "11": ("Missing data", ("data",), "of files and metadata"),
    "12a": ("Use of the data, partitions", ("data",), ""),
    "12b": ("Handling of predictors", ("model",), ""),
    "12c": ("Type of model, building, tuning, internal validation", ("training",), ""),
    "12d": ("Heterogeneity across clusters", ("subgroups",), ""),
    "12e": ("Measures and plots of performance", ("performance", "calibration"), ""),
    "12f": ("Model updating", ("calibration",), "recalibration on validation only"),
    "12g": ("How predictions were calculated", ("model",), ""),
    "13": ("Class imbalance", ("training",), ""),
    "14": ("Approaches to fairness", ("subgroups",), "measured, not addressed in training"),
    "15": ("Output and thresholds", ("decisions",), ""),
    "16": (
        "Differences between development and evaluation data",
        ("data", "ood"),
        "split and share of unusual images only",
    ),
    "17": ("Ethical approval and consent", (), ""),
    "18a": ("Funding", (), ""),
    "18b": ("Conflicts of interest", (), ""),
    "18c": ("Protocol", (), ""),
    "18d": ("Registration", (), ""),
    "18e": ("Availability of the data", ("data",), "the source, if it is in the registry"),
    "18f": ("Availability of the code", ("training",), ""),
    "19": ("Patient and public involvement", (), ""),
    "20a": ("Flow of participants", ("data",), "images and patients by split, no follow-up"),
    "20b": ("Characteristics of participants", ("subgroups",), "the columns given with --by"),
    "20c": ("Comparison with the development data", ("data",), "outcomes by split only"),
    "21": ("Participants and outcomes in each analysis", ("data",), ""),
    "22": ("Full model for third parties", ("model",), ""),
    "23a": ("Performance with intervals, also of subgroups", ("performance", "subgroups"), ""),
    "23b": ("Heterogeneity of performance", ("subgroups",), ""),
    "24": ("Results of model updating", ("calibration",), "recalibration on validation only"),
    "25": ("Interpretation", (), ""),
    "26": ("Limitations", ("limits",), "those that follow from the results"),
    "27a": ("Poor or missing input", ("ood", "limits"), "unlike images only, not poor quality"),
    "27b": ("Interaction and expertise of users", (), ""),
    "27c": ("Next steps", (), ""),
}

CLAIM: dict[str, _Item] = {
    "1": ("Identified as AI, with its category", ("model",), ""),
    "2": ("Summary of design, methods, results", ("summary",), "results only"),
    "3": ("Background, intended use and role", ("model",), "intended use only"),
    "4": ("Aims and hypotheses", (), ""),
    "5": ("Prospective or retrospective", (), ""),
    "6": ("Goal of the study", ("summary",), ""),
    "7": ("Sources of the data", ("data",), ""),
    "8": ("Inclusion and exclusion criteria", (), ""),
    "9": ("Preprocessing", ("model",), ""),
    "10": ("Selection of subsets", ("data",), ""),
    "11": ("De-identification", (), ""),
    "12": ("Missing data", ("data",), "of files and metadata"),
    "13": ("Acquisition of the images", (), ""),
    "14": ("Reference standard: definition", (), ""),
    "15": ("Reference standard: rationale", (), ""),
    "16": ("Reference standard: source of annotations", (), ""),
    "17": ("Annotation of the test set", (), ""),
    "18": ("Variability between and within raters", (), ""),
    "19": ("Assignment to partitions", ("data",), ""),
    "20": ("Level at which partitions are disjoint", ("data", "patients"), ""),
    "21": ("Intended sample size", (), ""),
    "22": ("Description of the model", ("model",), ""),
    "23": ("Software libraries", ("training",), ""),
    "24": ("Initialisation of parameters", ("training",), ""),
    "25": ("Training", ("training",), ""),
    "26": ("Selection of the final model", ("training",), ""),
    "27": ("Ensembles", ("training",), ""),
    "28": ("Metrics", ("performance",), ""),
    "29": ("Significance and uncertainty", ("performance",), ""),
    "30": ("Robustness", ("corruptions",), ""),
    "31": ("Explainability", ("explanations",), ""),
    "32": ("Evaluation on internal data", ("internal",), ""),
    "33": ("Testing on external data", ("external",), ""),
    "34": ("Registration of a trial", (), ""),
    "35": ("Numbers included and excluded", ("data",), "files that were passed over, not patients"),
    "36": (
        "Characteristics of cases in each partition",
        ("data",),
        "classes; demographics of the evaluated images only",
    ),
    "37": ("Performance and its uncertainty", ("performance",), ""),
    "38": ("Diagnostic performance and its precision", ("decisions", "performance"), ""),
    "39": ("Failure analysis", ("failures",), ""),
    "40": ("Limitations", ("limits",), "those that follow from the results"),
    "41": ("Implications for practice", (), ""),
    "42": ("Protocol or technical details", ("training",), "technical details, no protocol"),
    "43": ("Availability of software, model, data", ("model", "data"), ""),
    "44": ("Funding", (), ""),
}

CHECKLISTS: dict[str, dict[str, _Item]] = {"TRIPOD+AI": TRIPOD, "CLAIM": CLAIM}


@dataclass(frozen=True)
class Answer:
    """How a report covers an item: `status` is "reported", "partly", "not covered" or "stated by the authors"."""

    number: str
    topic: str
    status: str
    sections: tuple[str, ...] = ()
    note: str = ""


def answers(name: str, present: Collection[str], statements: Mapping[str, str]) -> list[Answer]:
    """Returns how each item of a checklist is covered.

    Args:
        name: "TRIPOD+AI" or "CLAIM".
        present: keys of the sections that the report has, and "internal" or "external" for the source of its data, and
            "patients" where these are known.
        statements: what the authors state, by number of the item.

    Raises:
        ValueError: a statement for a number that the checklist does not have.
    """
    items = CHECKLISTS[name]
    if unknown := [number for number in statements if number not in items]:
        raise ValueError(f"{name} has no item {', '.join(unknown)}; its items are {', '.join(items)}")
    found = []
    for number, (topic, sections, lacking) in items.items():
        there = tuple(section for section in sections if section in present)
        if not there:
            status, note = MISSING, "to be supplied by the authors" if not sections else _why(sections)
        elif len(there) < len(sections) or lacking:
            missing = [section for section in sections if section not in present]
            status, note = PARTLY, "; ".join([text for text in (lacking, _why(missing) if missing else "") if text])
        else:
            status, note = REPORTED, ""
        if statement := statements.get(number):
            status, note = STATED, statement
        found.append(Answer(number, topic, status, there, note))
    return found


_HOW = {
    "subgroups": "no subgroups: give --by",
    "decisions": "no operating point stored with the model: medmamba decide",
    "corruptions": "no corrupted images: give --corruptions",
    "explanations": "no explanations: give --explain",
    "external": "only if the evaluated data are of another source: give --external",
    "internal": "these data are of another source",
    "patients": "patients are not known: give --patient-pattern, or a column of patients",
    "training": "the model folder records no training",
    "ood": "the model has no detector of unusual images",
    "failures": "no image was misclassified",
}


def _why(sections: Collection[str]) -> str:
    return "; ".join(_HOW.get(section, f"no section on {section}") for section in sections)
