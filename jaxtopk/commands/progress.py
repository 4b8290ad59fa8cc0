"""The progress bar of every subcommand."""

import rich.console
import rich.progress


def progress_bar() -> rich.progress.Progress:
    """A spinner while the total is not known, then a bar; on standard error, and only where someone looks."""
    console = rich.console.Console(stderr=True)
    return rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
