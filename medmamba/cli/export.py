"""The subcommand `medmamba export`."""

import argparse
import sys
from typing import Any

from .messages import say

FORMATS = ("onnx", "torch-export")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "export",
        help="export a model to ONNX or torch.export",
        description="Exports a model for any batch and image size. The file is written only if its outputs (fp16 and "
        "int8: its accuracy) match those of PyTorch.",
        epilog="example: medmamba export medmamba/bloodmnist --to onnx --out bloodmnist.onnx",
    )
    parser.add_argument("model", metavar="MODEL", help="bundled name, org/name[@revision] or folder")
    parser.add_argument("--to", required=True, choices=FORMATS, help="output format")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write (.onnx or .pt2)")
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="files, folders or globs to compare outputs on (default: synthetic images)",
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="maximum difference from PyTorch's outputs (default: %(default)s)"
    )
    onnx = parser.add_argument_group("ONNX only")
    onnx.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "fp16", "int8"),
        help="fp16: half the size; int8: a quarter, calibrated on --images (default: %(default)s)",
    )
    onnx.add_argument(
        "--check-data",
        metavar="DIR",
        help="labelled test images, on which fp16 and int8 may lose at most half a point of accuracy",
    )
    onnx.add_argument("--check-limit", type=int, metavar="N", help="use N of these, evenly spaced (default: all)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..export import ExportError, to_onnx, to_torch_export
    from ..imaging.load import find_images
    from ..model import MedMamba

    if args.to != "onnx" and (args.precision != "fp32" or args.check_data or args.check_limit):
        raise ExportError("--precision, --check-data and --check-limit are for --to onnx")
    found = find_images(args.images) if args.images else None
    if found and found.passed_over:
        print(found, file=sys.stderr)
    images = found.paths if found else []
    model = MedMamba.from_pretrained(args.model)
    if args.to == "onnx":
        report = to_onnx(
            model,
            args.out,
            precision=args.precision,
            images=images,
            check_data=args.check_data,
            check_limit=args.check_limit,
            tolerance=args.tolerance,
        )
    else:
        report = to_torch_export(model, args.out, images=images, tolerance=args.tolerance)
    say(str(report))
    return 0
