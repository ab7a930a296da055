"""The subcommand `medmamba doctor`."""

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="show versions, devices and backends, and how to install what is missing",
        description="Shows versions, devices, scan backends and optional packages, and how to install what is missing.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from .doctor_report import report
    from .messages import say

    rows = report()
    width = max(len(what) for what, _ in rows)
    for what, finding in rows:
        say(f"{what:<{width}}  {finding}")
    return 0
