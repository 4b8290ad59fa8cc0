"""`jaxtopk evaluate`: scores a model on tasks of several lengths, under several attention settings side by side."""

import dataclasses
import pathlib
import sys
import typing
from typing import Annotated, Any, Literal

import rich.box
import rich.console
import rich.table
import tyro

from jaxtopk.commands.options import ModelOptions, SparseOptions
from jaxtopk.commands.progress import progress_bar

if typing.TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxtopk.evaluation.settings import Setting
    from jaxtopk.evaluation.tasks.base import AnyTask

Flag = tyro.conf.FlagCreatePairsOff

_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Scores a model on tasks of several lengths, under several attention settings side by side.

    Every sample is prefilled once and answered under each setting from the same cache. The folder receives config.json,
    results.jsonl (a row a sample and setting), sessions.jsonl and report.html. The same command goes on where it was
    stopped; more tasks, lengths or samples may be added to the same folder.
    """

    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ()
    """Tasks that are made up, or groups of them: ruler, infinitebench, all."""
    suite: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME[:TASK,TASK]=FOLDER ...")] = ()
    """Published suites on this machine: ruler, helmet, longbench_v2 or infinitebench, and where; all tasks, or those named."""
    lengths: tuple[int, ...] = (2048,)
    """Tokens that prompt and reply may take."""
    attention: tuple[Literal["full", "topk"], ...] | None = None
    """Kinds to compare; the default is full, and topk where budgets are given."""
    ratios: tuple[float, ...] = ()
    """A setting each: the share of its visible keys that a row keeps, in (0, 1]."""
    topk: tuple[int, ...] = ()
    """A setting each: the number of keys that a row keeps."""
    samples: int = 100
    """Of each task and length."""
    depths: tuple[float, ...] = ()
    """Of the needle in the task niah, in turn, 0 to 1; the default is forty depths."""
    seed: int = 0
    """Of the samples."""
    batch: int | None = None
    """Samples at a time; the default is what fits the device's memory, 4 on a CPU."""
    minutes: float | None = None
    """Stop after the batch in which so many minutes are over; the same command then goes on."""
    haystack: str = "noise"
    """What needles hide in: noise, shakespeare, or a text file."""
    qa: pathlib.Path | None = None
    """For qa_1 and qa_2: a file of questions, or a folder with squad.jsonl and hotpotqa.jsonl."""
    chat: Flag[bool] = False
    """Give prompts as a user's message, through the model's chat template."""
    mesh: Annotated[tuple[str, ...], tyro.conf.arg(metavar="AXIS=DEVICES ...")] = ()
    """Devices of this process along data (splits batches), fsdp and tensor, such as data=8; the default is one device."""
    part: Annotated[str | None, tyro.conf.arg(metavar="P/N")] = None
    """This process takes every N-th sample, from the P-th on (0 is the first); all write to one folder."""
    distributed: Flag[bool] = False
    """Take P and N from jax.distributed, which finds the other processes of a pod or a cluster's job."""
    out: pathlib.Path
    """Folder of the run."""
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = ModelOptions()
    sparse: tyro.conf.OmitArgPrefixes[SparseOptions] = SparseOptions()

    def run(self) -> None:
        """Evaluates, prints the scores, writes the report.

        Raises:
          ValueError: bad input, found before the model is loaded where that is possible.
          FileNotFoundError: the model does not exist.
        """
        from jaxtopk.analysis.run_folder import RunFolder

        folder = RunFolder(self.out)
        folder.check()
        axes = self._axes()
        with progress_bar() as progress:
            bar = progress.add_task("starting", total=None)
            # JAX and the model code are imported here, so that --help and mistakes in the flags answer at once.
            tasks = self._tasks()
            self._check_numbers()
            settings = self._settings()
            import jax

            part, parts = (
                self._part()
            )  # before anything asks for devices: those of all processes belong together
            self.model.select_device()
            mesh = self._make_mesh(axes)
            progress.update(bar, description=f"loading {self.model.model}")
            model, tokenizer = self.model.load(settings[0].strategy)

            from jaxtopk.evaluation import harness

            config = harness.EvaluationConfig(
                model=self.model.model,
                tasks=tuple(task.name for task in tasks),
                lengths=self.lengths,
                samples=self.samples,
                settings=settings,
                seed=self.seed,
                chat=self.chat,
                dtype=str(model.embed[...].dtype),
                made_with={
                    "haystack": self.haystack,
                    "depths": list(self.depths),
                    "qa": None if self.qa is None else str(self.qa),
                    "suites": sorted(self.suite),
                },
            )
            show = lambda done, total, what: progress.update(
                bar, description=what, completed=done, total=total
            )
            seconds = harness.evaluate(
                model,
                tokenizer,
                tasks,
                config,
                folder,
                batch=self.batch,
                mesh=mesh,
                part=part,
                parts=parts,
                minutes=self.minutes,
                on_progress=show,
            )
            progress.update(bar, description="writing the report")
            rows = write_report(folder, len(settings))
        if jax.process_index() == 0:
            _print(rows)
        sys.stderr.write(_timing(seconds) + "\n")
        sys.stderr.write(f"report: {folder.report}\n")

    def _check_numbers(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths: got {self.lengths}, wanted at least one, each at least 1")
        for name in ("samples", "batch"):
            if (got := getattr(self, name)) is not None and got < 1:
                raise ValueError(f"{name}: got {got}, wanted at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes: got {self.minutes}, wanted a number above 0")

    def _tasks(self) -> "list[AnyTask]":
        from jaxtopk.evaluation.depth_grid import DepthGrid
        from jaxtopk.evaluation.suites.opening import open_suite
        from jaxtopk.evaluation.tasks.haystack import Haystack
        from jaxtopk.evaluation.tasks.niah import NeedleInHaystack
        from jaxtopk.evaluation.tasks.registry import expand_names, make_task

        if not self.tasks and not self.suite:
            raise ValueError("tasks: got none, wanted --tasks, --suite or both")
        names = expand_names(self.tasks)
        for name in self.tasks:
            if self.tasks.count(name) > 1:
                raise ValueError(f"tasks: got {name} twice, wanted each once")
        haystack = Haystack.named(self.haystack)
        made: list[AnyTask] = [make_task(name, haystack=haystack, qa=self.qa) for name in names]
        if self.depths and "niah" not in names:
            raise ValueError(f"depths: got {self.depths} without the task niah, wanted it too")
        for index, task in enumerate(made):
            if self.depths and task.name == "niah" and isinstance(task, NeedleInHaystack):
                made[index] = DepthGrid(task=task, depths=self.depths)
        for entry in self.suite:
            name, subtasks, path = _parse_suite(entry)
            made += open_suite(name, path, subtasks=subtasks, model_chat=self.chat)
        return made

    def _settings(self) -> "tuple[Setting, ...]":
        from jaxtopk.evaluation.settings import make_settings

        return make_settings(
            attention=self.attention,
            ratios=self.ratios,
            topks=self.topk,
            options=self.sparse.given(),
        )

    def _axes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for entry in self.mesh:
            name, equals, size = entry.partition("=")
            if name not in _AXES or not equals or not size.isdecimal() or int(size) < 1:
                raise ValueError(
                    f"mesh: got {entry!r}, wanted AXIS=DEVICES with an axis of {', '.join(_AXES)}"
                )
            if name in sizes:
                raise ValueError(f"mesh: got {name} twice, wanted each axis once")
            sizes[name] = int(size)
        return sizes

    def _make_mesh(self, axes: dict[str, int]) -> "Mesh | None":
        if not axes:
            return None
        import math

        import jax

        from jaxtopk.sharding import make_mesh

        wanted, devices = math.prod(axes.values()), jax.local_devices()
        if wanted > len(devices):
            raise ValueError(
                f"mesh: got {' '.join(self.mesh)}, wanted at most the {len(devices)} devices of this process"
            )
        return make_mesh(**{"data": 1, "fsdp": 1, "tensor": 1} | axes, devices=devices[:wanted])

    def _part(self) -> tuple[int, int]:
        from jaxtopk.evaluation.batches import own_indices

        if self.distributed:
            if self.part is not None:
                raise ValueError(f"part: got {self.part} and --distributed, wanted one of them")
            import jax

            jax.distributed.initialize()
            return jax.process_index(), jax.process_count()
        if self.part is None:
            return 0, 1
        part, slash, parts = self.part.partition("/")
        if not slash or not part.isdecimal() or not parts.isdecimal():
            raise ValueError(f"part: got {self.part!r}, wanted P/N, such as 0/4")
        own_indices(0, int(part), int(parts))
        return int(part), int(parts)


def write_report(folder, settings: int) -> list[dict[str, Any]]:
    """Writes report.html of whatever rows a folder holds, of all processes, and returns the rows.

    Args:
      folder: a `RunFolder` with at least one sample.
      settings: rows of a sample.
    """
    import json

    from jaxtopk.evaluation import harness, records, report

    rows = records.read_rows(folder, settings)
    config = json.loads(folder.config.read_text(encoding="utf-8"))
    folder.write_report(report.page(config, rows, harness.sessions(folder)))
    return rows


def _parse_suite(entry: str) -> tuple[str, tuple[str, ...] | None, str]:
    """Reads NAME=FOLDER or NAME:TASK,TASK=FOLDER."""
    name, equals, path = entry.partition("=")
    name, colon, subtasks = name.partition(":")
    if not equals or not name or not path:
        raise ValueError(f"suite: got {entry!r}, wanted NAME=FOLDER or NAME:TASK,TASK=FOLDER")
    return name, tuple(subtasks.split(",")) if colon else None, path


def _print(rows) -> None:
    from jaxtopk.evaluation import report, summary

    cells, averages = summary.summarise(rows), summary.average(rows)
    console = rich.console.Console()
    for length in sorted({cell.length for cell in cells}):
        header, body = report.score_table(
            [cell for cell in cells if cell.length == length],
            [entry for entry in averages if entry.length == length],
            intervals=False,
        )
        table = rich.table.Table(title=f"Scores at {length} tokens, percent", box=rich.box.SIMPLE)
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in body:
            table.add_row(*row)
        console.print(table)


def _timing(seconds: dict[str, float]) -> str:
    busy = seconds["total"] - seconds["compile"]
    share = lambda name: (
        f"{name} {seconds[name]:.1f} s ({100 * seconds[name] / max(busy, 1e-9):.0f}%)"
    )
    return (
        f"{seconds['total']:.1f} s, of which compiling {seconds['compile']:.1f} s; of the rest "
        + ", ".join(map(share, ("prefill", "decode", "host")))
    )
