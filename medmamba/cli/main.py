"""The `medmamba` command."""

import argparse
import importlib
import os
import re
import select
import sys
import traceback

from .._version import __version__
from .messages import message, say

# The subcommands, each a module with `add_parser(subparsers)` that imports what it needs only when it runs.
SUBCOMMANDS = ("predict", "doctor", "train", "evaluate", "explain", "export")

INTERRUPTED = 130  # exit codes as shells have them for programs that a signal ended: SIGINT,
BROKEN_PIPE = 141  # and SIGPIPE


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit code: 0; 1 where some input failed; 2 for wrong usage or an error; 130 where it was interrupted; 141
        where the program that read its output has gone, as `head` does.
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
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
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
    """Whether the reader of standard output has gone: a pipe to another process can break too."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # not on Windows, and not where there is no file
        return True
    return bool(poll.poll(0))


def _reader_gone() -> int:
    """Lets Python end without a word about the output that nobody reads."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    return BROKEN_PIPE


def pick_device(name: str):
    """The torch device by name; "auto" takes a GPU where there is one.

    Raises:
        ValueError: no such device here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"cannot use device {name!r}: {str(error).splitlines()[0]}; `medmamba doctor` shows what there is"
        ) from error
    return device
