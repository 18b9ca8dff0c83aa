"""What is seen of a comparison while it runs."""

from typing import Any

from .plan import Line


class Progress:
    """One bar over all runs, what each job is doing, and the time that is left by the runs so far."""

    def __init__(self, total: int, done: int, jobs: int, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self.console, self.jobs, self.spent = console, jobs, [0.0, 0]
        self.total, self.done = total, done
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self.all = self.bars.add_task("runs", total=self.total, completed=done)
        self.jobs_tasks = [self.bars.add_task("", total=None, visible=False) for _ in range(jobs)]

    def expect(self, runs: int) -> None:
        """So many are to come: the rates are known now, and with them which final runs are there."""
        self.total = self.done + runs
        self.bars.update(self.all, total=self.total)

    def say(self, slot: int, text: str) -> None:
        self.bars.update(self.jobs_tasks[slot], description=text, visible=True)

    def finished(self, slot: int, what: str, line: Line, seconds: float) -> None:
        self.spent[0] += seconds
        self.spent[1] += 1
        self.done += 1
        nll = "not finite" if line["nll"] is None else f"{line['nll']:.4f}"
        scores = "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in line.get("scores", {}).items())
        left = (self.total - self.done) * self.spent[0] / self.spent[1] / self.jobs
        self.bars.update(self.all, completed=self.done, description=f"runs, about {_duration(left)} left")
        self.bars.update(self.jobs_tasks[slot], visible=False)
        self.console.print(
            f"{what}: NLL {nll}{scores} ({seconds:.0f} s; {self.done} of {self.total}, about {_duration(left)} left)",
            markup=False,
            soft_wrap=True,
        )

    def failed(self, slot: int, text: str) -> None:
        self.bars.update(self.jobs_tasks[slot], visible=False)
        self.console.print(text, markup=False, style="red")


def _duration(seconds: float) -> str:
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
