"""Generate with language models, and measure them.

folojax generate --prompts "The sea is" --max-tokens 40
folojax generate --input requests.jsonl --output answers.jsonl --resume
folojax bench --num-prompts 32
folojax plan --max-model-len 512

`folojax COMMAND --help` has the options of a command, and more examples.

Exit code: 0; 1 if lines of --input went wrong; 2 after a mistake; 130 after Ctrl-C.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from folojax import __version__
from folojax.cli import bench, generate, plan

_COMMANDS = {"generate": generate, "bench": bench, "plan": plan}


class _Parser(argparse.ArgumentParser):
    """argparse, with a mistake told in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help shows the options)")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ValueError says what is wrong with it."""
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="folojax", description=__doc__, formatter_class=form)
    parser.add_argument("--version", action="version", version=f"folojax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        assert module.__doc__ is not None
        told, _ = module.__doc__.split("\n", 1)
        module.add_arguments(
            commands.add_parser(
                name,
                help=told,
                usage=f"folojax {name} [OPTIONS]",
                description=module.__doc__,
                formatter_class=form,
                allow_abbrev=False,
            )
        )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; a mistake of the user's is one line and exit code 2."""
    try:
        args = parse_args(argv)
        return _COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read standard output has gone; else Python would stumble over it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: standard output was closed", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
