"""A bar for what takes longer. No torch here."""

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class _Console(Console):
    """Standard output, on which nothing moves but on a terminal, whatever FORCE_COLOR says."""

    def __init__(self) -> None:
        super().__init__(force_terminal=sys.stdout.isatty())

    def on_broken_pipe(self) -> None:
        """Let the script end as it does of any closed pipe: rich would exit with 1."""
        raise BrokenPipeError


def progress_bar(*, auto_refresh: bool = True) -> Progress:
    """A bar with the time left; one line at the end where the output is no terminal.

    Args:
        auto_refresh: redraw from a thread of its own; without, only when the bar is told to.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        auto_refresh=auto_refresh,
        console=_Console(),
    )
