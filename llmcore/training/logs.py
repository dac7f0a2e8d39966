"""What a run writes while it trains: ``log.jsonl``, TensorBoard events, ``loss.png`` and the progress bar."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``log.jsonl``, oldest first, as one history.

    A run that was killed has logged steps its checkpoint doesn't hold and takes them again after it resumes; a
    ``start`` record voids what came after its step, at step 0 everything. A line cut short by a kill, or that is no
    record, is skipped.
    """
    records: list[dict[str, Any]] = []
    path = Path(path)
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or not {"kind", "step"} <= record.keys():
            continue
        if record["kind"] == "start":
            records = [r for r in records if r["step"] <= record["step"] > 0]
        records.append(record)
    return records


def _ends_with_newline(path: Path) -> bool:
    """True of an empty file too."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            return True
        file.seek(size - 1)
        return file.read(1) == b"\n"


class RunLog:
    """Appends records to ``run_dir/log.jsonl`` and, where tensorboard is installed, mirrors their numbers as events.

    A record is one JSON object with ``kind`` (``start``, ``train``, ``eval``, ``stop``), ``step`` (optimizer steps
    taken so far) and numbers or lists of numbers. Losses are in nats per token, times in seconds.
    """

    def __init__(self, run_dir: Path, *, step: int, tensorboard: bool, echo: Any = print) -> None:
        self.path = run_dir / "log.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open for the whole run
        if not _ends_with_newline(self.path):  # a line cut short by a kill
            self._file.write("\n")
        self._events = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else 0)
            except ImportError:
                echo("no TensorBoard logs: the package tensorboard isn't installed (pip install tensorboard)")

    def write(self, kind: str, step: int, **values: Any) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._events.add_scalar(f"{kind}/{name}", value, step)
                elif isinstance(value, list):
                    for index, item in enumerate(value):
                        self._events.add_scalar(f"{kind}/{name}/{index}", item, step)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def plot_losses(records: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw training and held-out loss over steps as a PNG. False, and no file, where matplotlib isn't installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind, label, style in (("train", "training", "-"), ("eval", "held-out", "o-")):
        points = [(r["step"], r["loss"]) for r in records if r["kind"] == kind]
        if points:
            axes.plot(*zip(*points), style, label=label, linewidth=1, markersize=4, alpha=0.9)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))
    return True


def clock(seconds: float) -> str:
    """``seconds`` as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class Display:
    """A live progress bar on a terminal; elsewhere one plain line each ``log_every`` steps."""

    def __init__(self, *, log_every: int) -> None:
        self.console = Console(stderr=True)
        self.log_every = log_every
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.fields[step]}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=1.0, step="0", text="")

    def __enter__(self) -> Display:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, step: int, steps: int, done: float, text: str) -> None:
        """Show that ``step`` of ``steps`` (0 = no limit) is taken and a fraction ``done`` of the run."""
        of = f"{step}/{steps}" if steps else str(step)
        if self._bar:
            self._bar.update(self._task, completed=done, step=of, text=text)
        elif step % self.log_every == 0:
            self.line(f"step {of}  {text}")

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)
