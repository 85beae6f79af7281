"""The command line: one module a command, each with `HELP`, `arguments(parser)`, `run(args)` and `show(result)`.

`run` returns one JSON-able dict; `"ok": False` in it makes the exit status 1. `show` prints it for people.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module

COMMANDS = ("info", "demo", "verify", "bench", "tune", "inspect")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="vitkernels", description="Pixels in, tokens out: fused patch embedding.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    named = next((word for word in argv if not word.startswith("-")), None)
    for name in COMMANDS if named not in COMMANDS else (named,):  # import only what is asked for
        module = import_module(f".{name}", __name__)
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        module.arguments(command)
        command.set_defaults(module=module)
    args = parser.parse_args(argv)
    try:
        result = args.module.run(args)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        print(f"vitkernels {args.command}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result)) if args.json else args.module.show(result)
    return 0 if result.get("ok", True) else 1
