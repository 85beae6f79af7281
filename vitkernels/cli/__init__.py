"""The command line: one module a command, each with `HELP`, `arguments(parser)`, `run(args)` and `show(result)`.

`run` returns one JSON-able dict; `"ok": False` in it makes the exit status 1. `show` prints it for people.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib import import_module
from typing import Any, NoReturn

from .. import __version__

COMMANDS = ("info", "demo", "verify", "bench", "report", "profile", "tune", "inspect")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def positive(text: str) -> int:
    """For argparse: an int of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


@contextmanager
def ticking(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done, where somebody watches."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield lambda text: status.update(escape(text))


def console_for(width: int) -> Any:
    """A terminal has its own width; a file has room for what a table's rows hold."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=width)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="vitkernels", description="Pixels in, tokens out: fused patch embedding.")
    parser.add_argument("--version", action="version", version=f"vitkernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    named = next((word for word in argv if not word.startswith("-")), None)
    for name in COMMANDS if named not in COMMANDS else (named,):  # import only what is asked for
        try:
            module = import_module(f".{name}", __name__)
        except Exception as error:  # one broken command must not take the others' help with it
            if name == named:
                parser.error(f"{name} can't be loaded: {_line(error)}")
            commands.add_parser(name, help=f"can't be loaded: {_line(error)}".replace("%", "%%"))
            continue
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        module.arguments(command)
        command.set_defaults(module=module)
    args = parser.parse_args(argv)
    try:
        with redirect_stdout(sys.stderr) if args.json else nullcontext():
            result = args.module.run(args)
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        print(f"vitkernels {args.command}: {_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result)) if args.json else args.module.show(result)
    return 0 if result.get("ok", True) else 1


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
