"""What the studies' commands share: how bad input ends, which flags change a preset, the clock, and the table at the end.

No import of JAX here: the command line is read before JAX looks for devices.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import rich.box
import rich.console
import rich.markup
import rich.table


@contextlib.contextmanager
def bad_input_in_one_line(name: str) -> Iterator[None]:
    """Ends the process with one line and exit code 2 where its input is refused; JAXTOPK_TRACEBACK=1 shows all of it."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotImplementedError, ConnectionError) as error:
        if os.environ.get("JAXTOPK_TRACEBACK") == "1":
            raise
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def given(arguments: Any, *names: str) -> dict[str, Any]:
    """Returns those of the named flags that were given: what changes in a preset."""
    flags = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in flags.items() if value is not None}


class Clock:
    """Time since a command began, and its budget.

    Args:
      budget_seconds: None is no end.
    """

    def __init__(self, budget_seconds: float | None):
        self._begin = time.monotonic()
        self._budget = float("inf") if budget_seconds is None else budget_seconds

    @property
    def seconds(self) -> float:
        """Time since the beginning [s]."""
        return time.monotonic() - self._begin

    @property
    def is_over(self) -> bool:
        """Whether nothing new is to start."""
        return self.seconds > self._budget

    def say(self, line: str) -> None:
        """Prints a line with its time in front, at once."""
        print(f"[{self.seconds:6.1f} s] {line}", flush=True)


def print_table(
    title: str,
    header: Sequence[str],
    body: Iterable[Sequence[str]],
    *,
    words: int,
    caption: str,
    notes: Iterable[str],
    width: int,
) -> None:
    """Prints a table, what its numbers are, and notes, a line each.

    Args:
      words: how many columns, the first ones, are text rather than numbers.
      width: columns of the page where there is no terminal to ask.
    """
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=width)
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        is_text = index < words
        table.add_column(
            rich.markup.escape(name), justify="left" if is_text else "right", no_wrap=is_text
        )
    for row in body:
        table.add_row(*map(rich.markup.escape, row))
    console.print(table)
    for line in (caption, *notes):
        console.print(line, style="dim", highlight=False, markup=False)
