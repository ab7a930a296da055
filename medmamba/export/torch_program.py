"""Export to a torch.export program."""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from ..inference.fitted import in_force
from ..utils.text import json_text
from .check import TOLERANCE, ExportError, ExportReport, check_batches, compare, export_view, written_whole

CONFIG_FILE = "config.json"  # in the file, beside the program


def to_torch_export(
    model, path: str | os.PathLike[str], *, images: Sequence[Any] = (), tolerance: float = TOLERANCE
) -> ExportReport:
    """Writes a `.pt2` file that accepts any batch size and any image of at least 32x32 pixels, on the CPU or a GPU.

    The scan stays one operator, `torch.ops.medmamba.scan_2d`, which selects its backend at run time: loading the file
    requires `import medmamba`, which `load_torch_export` does. Batch norms are folded. The file contains the model's
    configuration as the extra file `config.json`.

    The file is written only if the program, loaded again, gives the outputs of the model.

    Args:
        model: a `MedMamba` in any mode; it is not changed.
        path: of the file; ends in .pt2.
        images: inputs of `load_image` for the comparison; none: synthetic images.
        tolerance: of the comparison.

    Raises:
        ExportError: the outputs differ from the model's, or the folder does not exist.
        ImageError: an image cannot be read.
    """
    if Path(path).suffix != ".pt2":
        raise ExportError(f"the name of a torch.export program ends in .pt2, not {os.fspath(path)}")
    model = export_view(model)
    batches = check_batches(model.config, images)
    # torch.export would treat sizes that are 1 or equal to each other as fixed.
    example = torch.zeros(2, model.config.in_chans, 64, 96)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(model.fuse(), (example,), dynamic_shapes=(sizes,))
    _allow_all_sizes(program, model.config.min_size)
    with written_whole(path) as temporary:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights whose memory is channels-last
            record = json_text(in_force(model).config.to_dict())
            torch.export.save(program, temporary, extra_files={CONFIG_FILE: record})
        loaded, _ = load_torch_export(temporary)

        @torch.inference_mode()
        def run(images: np.ndarray) -> np.ndarray:
            return loaded(torch.from_numpy(images)).numpy()

        difference = compare(run, model, batches, tolerance)
        size = temporary.stat().st_size
    return ExportReport(Path(path), size, "fp32", [tuple(batch.shape) for batch in batches], difference)


def _allow_all_sizes(program: torch.export.ExportedProgram, least_size: int) -> None:
    """Removes the guards on sizes that tracing records where PyTorch picks a memory layout.

    The program is valid for other sizes too, such as a last feature map of one pixel, as the check confirms.
    """
    (image,) = (node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    for size, least in zip(image.meta["val"].shape, (1, None, least_size, least_size), strict=True):
        if least is not None:
            program.range_constraints[size.node.expr] = ValueRanges(least, int_oo)
    if hasattr(program, "_guards_code"):  # since torch 2.10
        program._guards_code = []


def load_torch_export(path: str | os.PathLike[str]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Loads a program; returns it as a module, and the configuration of the model, as in its `config.json`.

    A program is code: load only files that you trust.
    """
    extra = {CONFIG_FILE: ""}
    program = torch.export.load(os.fspath(path), extra_files=extra)
    return program.module(), json.loads(extra[CONFIG_FILE])
