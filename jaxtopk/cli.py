"""The `jaxtopk` command: finds the subcommand, parses its flags, and turns bad input into one line and exit code 2.

Nothing here imports JAX; a subcommand does once its flags are read.
"""

import importlib
import os
import sys
import typing
from collections.abc import Sequence


class _Entry(typing.NamedTuple):
    module: str
    command: str  # a dataclass of flags with a `run` method
    summary: str


_COMMANDS = {
    "generate": _Entry(
        "jaxtopk.commands.generate",
        "GenerateCommand",
        "continue prompts under full or Top-k attention",
    ),
    "analyze": _Entry(
        "jaxtopk.commands.analyze",
        "AnalyzeCommand",
        "measure attention entropy and Top-k mass, by layer, head and token",
    ),
    "evaluate": _Entry(
        "jaxtopk.commands.evaluate",
        "EvaluateCommand",
        "score a model on long-context tasks under several attention settings",
    ),
    "bench": _Entry(
        "jaxtopk.commands.bench",
        "BenchCommand",
        "time prompts and decoding at several contexts and attention settings",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
      argv: arguments after the program's name; None takes those of the process.

    Returns:
      The exit code: 0, or 2 after bad input, told in one line on standard error. With JAXTOPK_TRACEBACK=1 the error is
      raised instead.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        (sys.stdout if arguments else sys.stderr).write(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from jaxtopk import __version__

        sys.stdout.write(f"jaxtopk {__version__}\n")
        return 0
    name, *flags = arguments
    if name not in _COMMANDS:
        return _refuse(f"command: got {name!r}, wanted one of {', '.join(_COMMANDS)}")
    try:
        _parse(name, flags).run()
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        if os.environ.get("JAXTOPK_TRACEBACK") == "1":
            raise
        if isinstance(error, BrokenPipeError):
            return _close_pipe()
        return _refuse(str(error) or type(error).__name__)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return 130
    return 0


def _parse(name: str, flags: Sequence[str]):
    import tyro  # after the checks above, which need not wait for it

    entry = _COMMANDS[name]
    command = getattr(importlib.import_module(entry.module), entry.command)
    return tyro.cli(command, prog=f"jaxtopk {name}", args=flags)


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name:{width}}  {entry.summary}" for name, entry in _COMMANDS.items()]
    return (
        "usage: jaxtopk COMMAND [flags]\n\nSparse attention in JAX.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\njaxtopk COMMAND --help lists the flags of a command; jaxtopk --version prints the version.\n"
    )


def _refuse(message: str) -> int:
    sys.stderr.write(f"jaxtopk: error: {' '.join(message.split())}\n")
    return 2


def _close_pipe() -> int:
    # The reader (head, less) is gone; pointing stdout elsewhere keeps the interpreter from failing at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


if __name__ == "__main__":
    sys.exit(main())
