"""How far a run over the data has come: shown, or reported to a function."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from bnfreeze.calibration.batches import Batches

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

__all__ = ["Progress", "Steps"]

# None, whether to show a bar, or what is called with the number of batches done and of all.
Progress = bool | Callable[[int, int | None], object] | None


class Steps:
    """Counts batches over all passes; a context manager, for the bar."""

    def __init__(self, progress: Progress, batches: Batches, passes: int) -> None:
        self._progress = progress if callable(progress) else None
        self._shown = progress is True
        self._batches, self._passes, self._done = batches, passes, 0
        self._bar: Bar | None = None

    def __enter__(self) -> Steps:
        if self._shown:
            from rich.console import Console
            from rich.progress import Progress as Bar

            console = Console(stderr=True)
            if console.is_terminal:
                self._bar = Bar(console=console, transient=True)
                self._bar.start()
                self._bar.add_task("Running the model", total=self._total())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """Count one batch more."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        if self._progress is not None:
            self._progress(self._done, self._total())

    def more_passes(self, passes: int) -> None:
        """Say that there will be so many more passes than was said."""
        self._passes += passes
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], total=self._total())

    def _total(self) -> int | None:
        count = self._batches.count()
        return None if count is None else count * self._passes
