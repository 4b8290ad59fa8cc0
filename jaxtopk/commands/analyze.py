"""`jaxtopk analyze`: measures the attention entropy of a model, by layer, head and token, on a text or on tasks."""

import dataclasses
import io
import pathlib
import sys
import time
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import tyro

from jaxtopk.commands.options import AttentionOptions, ModelOptions
from jaxtopk.commands.progress import progress_bar

if typing.TYPE_CHECKING:
    from jaxtopk.analysis.measured_rows import MeasuredRows
    from jaxtopk.analysis.pieces import Piece
    from jaxtopk.attention import AttentionStrategy
    from jaxtopk.data.tokenizer import Tokenizer
    from jaxtopk.evaluation.tasks.base import Task, TokenTask
    from jaxtopk.models.decoder_lm.modeling import DecoderLM

Flag = tyro.conf.FlagCreatePairsOff


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalyzeCommand:
    """Measures attention entropy and Top-k mass, by layer, head and token, on a text or on tasks.

    The model runs under the attention given; what is measured is the full softmax over all keys each row may see, the mass of
    its best keys, and what the attention keeps of it. Rows of a text all count, and all are rows of the strategy. Of a task
    count the rows that predict its right answer, which the model is given to read; the prompt before them is prefilled as in
    generation.
    """

    out: pathlib.Path
    """Folder to receive config.json, results.jsonl and report.html; they appear once the run is complete."""
    text: pathlib.Path | None = None
    """A UTF-8 text file to measure on."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ()
    """Tasks, or suites of them, to measure on, such as niah cwe json_kv."""
    tokens: int = 1024
    """Tokens of a sequence, at most the model's context."""
    windows: int = 1
    """Stretches of so many tokens to take from the text, evenly spread."""
    samples: int = 4
    """Samples of each task."""
    topks: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (16, 64, 256, 1024)
    """Sizes of the sets of best keys whose mass is measured."""
    haystack: str = "noise"
    """Text that the tasks' needles hide in: noise, shakespeare, or a text file."""
    qa: pathlib.Path | None = None
    """File or folder of questions, for the tasks qa_1 and qa_2."""
    seed: int = 0
    """Fixes the samples of the tasks."""
    save_arrays: Flag[bool] = False
    """Also write arrays.npz: what was measured at every row, [layer, head, row], by task."""
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = ModelOptions()
    attention: tyro.conf.OmitArgPrefixes[AttentionOptions] = AttentionOptions()

    def run(self) -> None:
        """Measures, and writes the folder.

        Raises:
          ValueError: bad input, found before the model is loaded where that is possible.
          FileNotFoundError: the text or the model does not exist.
        """
        self._check_flags()
        text = self._read_text()
        # JAX and the model code are imported here, so that --help and mistakes in the flags answer at once.
        from jaxtopk.analysis.run_folder import RunFolder

        folder = RunFolder(self.out)
        folder.check()
        with progress_bar() as progress:
            bar = progress.add_task("starting", total=None)
            from jaxtopk.analysis.entropy import check_topks
            from jaxtopk.analysis.measure import measure
            from jaxtopk.analysis.measured_rows import MeasuredRows

            check_topks(self.topks)
            strategy = self.attention.build()
            tasks = self._make_tasks()
            self.model.select_device()
            progress.update(bar, description=f"loading {self.model.model}")
            model, tokenizer = self.model.load(strategy)
            if self.tokens > model.config.max_positions:
                raise ValueError(
                    f"tokens: got {self.tokens}, wanted at most the model's context of {model.config.max_positions}"
                )
            progress.update(bar, description="making the sequences")
            pieces = self._pieces(model, tokenizer, text, tasks)
            begin = time.perf_counter()
            parts: dict[str, list[MeasuredRows]] = {}
            progress.update(bar, description="measuring", total=len(pieces), completed=0)
            for piece, found in zip(pieces, measure(model, pieces, topks=self.topks), strict=True):
                parts.setdefault(piece.group, []).append(found)
                progress.advance(bar)
            seconds = time.perf_counter() - begin
            progress.update(bar, description="writing", total=None)
            rows = {group: MeasuredRows.join(found) for group, found in parts.items()}
            results = self._results(model, strategy, rows, seconds)
            from jaxtopk.analysis.entropy_report import page

            report = page(rows, results, attention=str(strategy), config=self)
            folder.write_config(self)
            folder.write_results(results)
            folder.write_report(report)
            if self.save_arrays:
                _write_arrays(folder.path / "arrays.npz", rows)
        sys.stdout.write(_summary(results))
        sys.stderr.write(f"{seconds:.1f} s with compilation; {folder.report}\n")

    def _check_flags(self) -> None:
        if self.text is None and not self.tasks:
            raise ValueError("text: got none, wanted --text FILE or --tasks NAME")
        for name, least in (("tokens", 2), ("windows", 1), ("samples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least {least}")

    def _read_text(self) -> str | None:
        if self.text is None:
            return None
        if not self.text.is_file():
            raise FileNotFoundError(f"text: got {self.text}, wanted an existing file")
        try:
            text = self.text.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"text: got {self.text}, which is no UTF-8 at byte {error.start}, wanted UTF-8 text"
            ) from None
        if not text.strip():
            raise ValueError(f"text: got {self.text}, which is empty, wanted a text")
        return text

    def _make_tasks(self) -> "list[Task | TokenTask]":
        if not self.tasks:
            return []
        from jaxtopk.evaluation.tasks.haystack import Haystack
        from jaxtopk.evaluation.tasks.registry import expand_names, make_task

        haystack = Haystack.named(self.haystack)
        names = expand_names(self.tasks)
        return [make_task(name, haystack=haystack, qa=self.qa) for name in names]

    def _pieces(
        self,
        model: "DecoderLM",
        tokenizer: "Tokenizer",
        text: str | None,
        tasks: "Sequence[Task | TokenTask]",
    ) -> "list[Piece]":
        from jaxtopk.analysis.pieces import task_pieces, text_pieces

        pieces = []
        if text is not None:
            pieces += text_pieces(text, tokenizer, tokens=self.tokens, windows=self.windows)
        for task in tasks:
            pieces += task_pieces(
                task,
                tokenizer,
                tokens=self.tokens,
                samples=self.samples,
                seed=self.seed,
                vocab_size=model.config.vocab_size,
            )
        return pieces

    def _results(
        self,
        model: "DecoderLM",
        strategy: "AttentionStrategy",
        rows: "Mapping[str, MeasuredRows]",
        seconds: float,
    ) -> list[dict[str, Any]]:
        from jaxtopk.analysis.measured_rows import MeasuredRows, summaries
        from jaxtopk.analysis.provenance import provenance

        made = provenance()
        groups = dict(rows)
        if len(groups) > 1:
            groups["all"] = MeasuredRows.join(list(rows.values()))
        return [
            {
                "study": "analyze",
                "group": group,
                **summary,
                "n": found.num_rows,
                "tokens": self.tokens,
                "model": self.model.model,
                "dtype": str(model.embed[...].dtype),
                "attention": strategy,
                "seed": self.seed,
                "seconds": seconds,
                **made,
            }
            for group, found in groups.items()
            for summary in summaries(found)
        ]


def _write_arrays(path: pathlib.Path, rows: "Mapping[str, MeasuredRows]") -> None:
    """Writes every measured array under group/name, and the sizes of the sets under topks, as float32 and int32."""
    import numpy as np

    from jaxtopk.analysis.run_folder import write_bytes

    arrays: dict[str, Any] = {}
    for group, found in rows.items():
        fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        arrays["topks"] = np.asarray(fields.pop("topks"), np.int32)
        del fields["ratios"], fields["ratio_mass"]  # not asked for
        arrays |= {f"{group}/{name}": value for name, value in fields.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())


def _summary(results: Sequence[Mapping[str, Any]]) -> str:
    """A few lines for the terminal: one for each task."""
    lines = []
    for row in results:
        if row["level"] != "total":
            continue
        masses = ", ".join(
            f"{entry['topk']}: {100 * entry['mass']:.1f}%"
            for entry in row["topk"]
            if entry["mass"] is not None
        )
        lines.append(
            f"{row['group']}: entropy {row['entropy']['mean']:.3f} nats ({100 * row['normalised']['mean']:.1f}% of ln n), "
            f"mass of the best {masses or '-'}; {row['n']} rows\n"
        )
    return "".join(lines)
