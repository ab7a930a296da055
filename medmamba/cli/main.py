"""Parser and exit codes of the `medmamba` command."""

import argparse
import importlib
import os
import re
import select
import sys
import traceback

from .._version import __version__
from .messages import message, say

# Each is a module with `add_parser(subparsers)`, which imports what it needs only when it runs.
SUBCOMMANDS = (
    *("predict", "doctor", "train", "evaluate", "decide", "explain", "export", "segment", "detect", "report", "drift"),
    "serve",
)

INTERRUPTED = 130  # exit codes that shells use for SIGINT
BROKEN_PIPE = 141  # and SIGPIPE


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        The exit code: 0 on success, 1 if some inputs failed, 2 for wrong usage or an error, 130 if interrupted, 141 if
        the reader of its output closed the pipe, as `head` does.
    """
    try:
        code = _main(argv)
        sys.stdout.flush()
        return code
    except SystemExit:  # of --help and --version
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            return _reader_gone()
        raise
    except BrokenPipeError:
        return _reader_gone()


def _main(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="medmamba",
        description="MedMamba medical image classification. For research; not a medical device.",
    )
    parser.add_argument("--version", action="version", version=f"medmamba {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in SUBCOMMANDS:
        importlib.import_module(f"medmamba.cli.{module}").add_parser(subparsers)
    for command in subparsers.choices.values():
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        # "--window -600,1500": numbers, not an option that begins with -6.
        command._negative_number_matcher = re.compile(r"-[\d.][\d.,eE+-]*$")
    args = parser.parse_args(argv)
    args.parser = subparsers.choices[args.command]
    try:
        return args.run(args) or 0
    except BrokenPipeError as error:
        if not _output_broken():
            return _failed(args, error)
        raise
    except KeyboardInterrupt:
        if args.debug:
            traceback.print_exc()
        say(f"medmamba {args.command}: interrupted", sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _failed(args, error)


def _failed(args: argparse.Namespace, error: Exception) -> int:
    if args.debug:
        traceback.print_exception(error)
    say(f"medmamba {args.command}: {message(error, args.parser)}", sys.stderr)
    return 2


def _output_broken() -> bool:
    """Returns whether it is standard output that has lost its reader, rather than another pipe."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # Windows, or standard output is not a file
        return True
    return bool(poll.poll(0))


def _reader_gone() -> int:
    """Redirects standard output to nowhere, so that Python exits without an error message about it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    return BROKEN_PIPE
