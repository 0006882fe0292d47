"""How far a run over the data has come: shown, or reported to a function."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from bnfreeze.calibration.batches import Batches

__all__ = ["Progress", "Steps"]

# None, whether to show a bar, or what is called with the number of batches done and of all.
Progress = bool | Callable[[int, int | None], object] | None


class Steps(ExitStack):
    """Counts batches over all passes; a context manager, for the bar."""

    def __init__(self, progress: Progress, batches: Batches, passes: int) -> None:
        super().__init__()
        self.passes = passes
        self._batches, self._done = batches, 0
        self._tell = progress if callable(progress) else None
        if progress is True:
            from rich.console import Console
            from rich.progress import Progress as Bar

            console = Console(stderr=True)
            if console.is_terminal:
                bar = self.enter_context(Bar(console=console, transient=True))
                task = bar.add_task("Running the model", total=None)
                self._tell = lambda done, total: bar.update(task, completed=done, total=total)

    def advance(self) -> None:
        """Count one batch more."""
        self._done += 1
        if self._tell is not None:
            count = self._batches.count()
            self._tell(self._done, None if count is None else count * self.passes)
