"""The images that come with the package, to try a model on."""

from __future__ import annotations

from pathlib import Path

from .image import ImageError, MedicalImage
from .load import load_image

_SUFFIXES = (".webp", ".jpg", ".jpeg", ".png")


def example_image(name: str = "blood_neutrophil") -> MedicalImage:
    """Returns one of the example images that come with medmamba; no network needed.

    They are held-out test images of 224 x 224 pixels, those of skin 256 x 256, all under CC BY 4.0; and blood smears of
    640 x 480 for detectors, under the MIT licence. `README.md` beside them names the sources; please cite these where
    you show an image: blood cells by A. Acevedo et al. (2020), doi:10.17632/snkd93bnjr.1; breast ultrasound by W.
    Al-Dhabyani et al. (2020), doi:10.1016/j.dib.2019.104863; chest X-rays by D. Kermany et al. (2018),
    doi:10.17632/rscbjbr9sj.2; photographs of skin by A. Pacheco et al. (2020), doi:10.17632/zr7vgbcyr2.1; blood smears
    by cosmicad and akshaylamba, BCCD, github.com/Shenggan/BCCD_Dataset.

    >>> model = medmamba.MedMamba.from_pretrained(medmamba.DEFAULT_MODEL)
    >>> print(model.predict(medmamba.example_image()))

    Args:
        name: kind of image and true class: "blood_" and basophil, eosinophil, erythroblast, immature_granulocyte,
            lymphocyte, monocyte, neutrophil or platelet; "breast_" and benign, malignant or normal; "chest_" and normal
            or pneumonia; "skin_" and actinic_keratosis, basal_cell_carcinoma, melanoma, nevus, seborrheic_keratosis or
            squamous_cell_carcinoma. "smear_" and 2_white_cells_and_4_platelets, white_cell_and_2_platelets or
            white_cell_and_4_platelets, which are what is boxed besides red cells. Spaces may stand for underscores.

    Raises:
        ImageError: there is no example of that name; the message lists all of them.
    """
    files = _files()
    wanted = name.strip().replace(" ", "_")
    if wanted not in files:
        raise ImageError(f"there is no example image {name!r}; there are {', '.join(files) or 'none'}")
    return load_image(files[wanted])


def _files() -> dict[str, Path]:
    package = Path(__file__).parents[1]
    for folder in (package / "examples", package.parent / "demo" / "examples"):  # an installed wheel; a clone
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES}
    return {}
