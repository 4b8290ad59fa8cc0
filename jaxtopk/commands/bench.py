"""`jaxtopk bench`: tokens per second of a model, at several contexts and under several attention settings in turn."""

import dataclasses
import pathlib
import statistics
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import rich.box
import rich.console
import rich.table
import tyro

from jaxtopk.commands.options import ModelOptions, SparseOptions
from jaxtopk.commands.progress import progress_bar

if typing.TYPE_CHECKING:
    from jaxtopk.attention import AttentionStrategy
    from jaxtopk.decoding.timing import DecodingTimes
    from jaxtopk.evaluation.settings import Setting
    from jaxtopk.models.decoder_lm.modeling import DecoderLM

_HOW = (
    "Prompts are random tokens. All settings decode greedily from one cache, in the compiled loop that generation runs, and "
    "take turns: medians of {rounds} rounds of {new_tokens} steps, and the range of the rounds, after one run of each that "
    "compiles and does not count."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchCommand:
    """Times prompts and decoding of a model, at several contexts and under several attention settings in turn.

    Prompts are random tokens: nothing but the model is needed, and what it writes means nothing. At each context the prompts
    are run first; then every setting decodes from the same cache, in turn, round by round. ms/token is the time of a step,
    one token of every sequence; tokens/s counts all sequences.
    """

    contexts: tuple[int, ...] = (1024,)
    """Tokens of a prompt; each is timed on its own."""
    batch: int = 1
    """Sequences side by side."""
    new_tokens: int = 32
    """Tokens that each sequence decodes a round."""
    attention: tuple[Literal["full", "topk"], ...] | None = None
    """Kinds to time; the default is full, and topk where budgets are given."""
    topk: tuple[int, ...] = ()
    """A setting each: the number of keys that a row keeps."""
    topk_ratio: tuple[float, ...] = ()
    """A setting each: the share of its visible keys that a row keeps, in (0, 1]."""
    rounds: int = 5
    """Rounds that count, after one that does not."""
    seed: int = 0
    """Of the random prompts."""
    out: pathlib.Path | None = None
    """Folder to receive config.json, results.jsonl and report.html; they appear once the run is complete."""
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = ModelOptions()
    sparse: tyro.conf.OmitArgPrefixes[SparseOptions] = SparseOptions()

    def run(self) -> None:
        """Times, and prints; writes the folder if asked.

        Raises:
          ValueError: bad input, found before the model is loaded where that is possible.
          FileNotFoundError: the model does not exist.
        """
        self._check_flags()
        folder = None
        if self.out is not None:
            from jaxtopk.analysis.run_folder import RunFolder

            folder = RunFolder(self.out)
            folder.check()
        # JAX and the model code are imported here, so that --help and mistakes in the flags answer at once.
        with progress_bar() as progress:
            bar = progress.add_task("starting", total=None)
            settings = self._settings()
            prefills = prefills_of(settings)
            self.model.select_device()
            progress.update(bar, description=f"loading {self.model.model}")
            model, _ = self.model.load(settings[0].strategy)
            self._check_model(model, settings)
            unstacked = model.unstacked()
            rows = []
            runs = (self.rounds + 1) * (len(prefills) + len(settings))
            progress.update(bar, total=runs * len(self.contexts), completed=0)
            for context in self.contexts:
                progress.update(bar, description=f"context {context}")
                times = self._time(
                    model, unstacked, context, prefills, settings, lambda: progress.advance(bar)
                )
                rows += self._rows(model, context, prefills, settings, times)
            progress.update(bar, description="writing", total=None)
            if folder is not None:
                report = _report(rows)
                folder.write_config(self)
                folder.write_results(rows)
                folder.write_report(report)
        _print(rows)
        if folder is not None:
            sys.stderr.write(f"report: {folder.report}\n")

    def _check_flags(self) -> None:
        if not self.contexts or min(self.contexts) < 1:
            raise ValueError(f"contexts: got {self.contexts}, wanted at least one, each at least 1")
        for name in ("batch", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, wanted at least 0")
        for name in ("contexts", "attention"):
            given = getattr(self, name) or ()
            for entry in given:
                if given.count(entry) > 1:
                    raise ValueError(f"{name}: got {entry} twice, wanted each once")
        if self.attention is not None:
            budgets = [name for name in ("topk", "topk_ratio") if getattr(self, name)]
            if "topk" in self.attention and not budgets:
                raise ValueError(
                    "attention: got topk without a budget, wanted --topk or --topk-ratio too"
                )
            if "topk" not in self.attention and budgets:
                raise ValueError(
                    f"{', '.join(budgets)}: got a value for full attention, wanted --attention topk too"
                )
        if self.sparse.sparse_suffix is not None:
            raise ValueError(
                f"sparse_suffix: got {self.sparse.sparse_suffix}, wanted none: prompts and decoded tokens are timed apart"
            )

    def _settings(self) -> "tuple[Setting, ...]":
        from jaxtopk.evaluation.settings import make_settings

        return make_settings(
            attention=self.attention,
            ratios=self.topk_ratio,
            topks=self.topk,
            options=self.sparse.given(),
        )

    def _check_model(self, model: "DecoderLM", settings: "Sequence[Setting]") -> None:
        longest, limit = max(self.contexts), model.config.max_positions
        if longest + self.new_tokens > limit:
            raise ValueError(
                f"contexts: got {longest} tokens + {self.new_tokens} new ones = {longest + self.new_tokens}, "
                f"wanted at most the model's context of {limit}"
            )
        for setting in settings:
            # Refuses layers that are not there, before the first prompt is run.
            setting.strategy.layer(0, model.config.num_layers)

    def _time(
        self,
        model: "DecoderLM",
        unstacked: "DecoderLM",
        context: int,
        prefills: "Mapping[str, AttentionStrategy]",
        settings: "Sequence[Setting]",
        done,
    ) -> "DecodingTimes":
        import jax
        import numpy as np

        from jaxtopk.decoding.timing import time_decoding

        rng = np.random.default_rng([self.seed, context])
        try:
            return time_decoding(
                model,
                unstacked,
                rng.integers(0, model.config.vocab_size, (self.batch, context)),
                prefills=prefills,
                strategies={setting.name: setting.strategy for setting in settings},
                new_tokens=self.new_tokens,
                rounds=self.rounds,
                done=done,
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(
                f"contexts: got {context} at batch {self.batch}, which the device's memory does not hold, wanted less"
            ) from error

    def _rows(
        self,
        model: "DecoderLM",
        context: int,
        prefills: "Mapping[str, AttentionStrategy]",
        settings: "Sequence[Setting]",
        times: "DecodingTimes",
    ) -> list[dict[str, Any]]:
        from jaxtopk.analysis.provenance import provenance
        from jaxtopk.evaluation.settings import keys_attended

        common = {
            "study": "bench",
            "model": self.model.model,
            "dtype": str(model.embed[...].dtype),
            "context": context,
            "batch": self.batch,
            "new_tokens": self.new_tokens,
            "capacity": times.capacity,
            "n": self.rounds,
            "seed": self.seed,
        }
        made = provenance()
        rows = []
        for name, strategy in prefills.items():
            found = times.prefill[name]
            tokens = self.batch * context
            rows.append(
                {
                    **common,
                    "measured": "prefill",
                    "setting": name,
                    "attention": strategy,
                    **_summary("seconds", list(found.rounds)),
                    **_summary("tokens_per_second", [tokens / one for one in found.rounds]),
                    "first_seconds": found.first,
                    **made,
                }
            )
        full = times.decode.get("full")
        visible = range(context + 1, context + self.new_tokens + 1)
        for setting in settings:
            found = times.decode[setting.name]
            tokens = self.batch * self.new_tokens
            row = {
                **common,
                "measured": "decode",
                "setting": setting.name,
                "attention": setting.strategy,
                "keys_attended": statistics.fmean(
                    keys_attended(setting.strategy, model.config, visible)
                ),
                **_summary("ms_per_token", [1e3 * one / self.new_tokens for one in found.rounds]),
                **_summary("tokens_per_second", [tokens / one for one in found.rounds]),
                "ms_per_token_rounds": [1e3 * one / self.new_tokens for one in found.rounds],
                "first_seconds": found.first,
            }
            if full is not None:
                # Round by round: both ran within moments of each other.
                pairs = zip(full.rounds, found.rounds, strict=True)
                row |= _summary("speed_over_full", [theirs / ours for theirs, ours in pairs])
            rows.append(row | made)
        return rows


def prefills_of(settings: "Sequence[Setting]") -> "dict[str, AttentionStrategy]":
    """Returns the different ways in which the settings run prompts; a full one, which most share, is called full."""
    from jaxtopk.attention import FullAttention

    found = {}
    for setting in settings:
        strategy = setting.strategy.prefill_strategy()
        found["full" if isinstance(strategy, FullAttention) else setting.name] = strategy
    return found


def _summary(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}


def _decode_cells(row: Mapping[str, Any], wide: bool) -> list[str]:
    low, high = row["ms_per_token_range"]
    against = ""
    if "speed_over_full" in row:
        against = f"{row['speed_over_full']:.2f}x"
        if wide:  # a terminal has no room for it
            against += " ({:.2f} to {:.2f})".format(*row["speed_over_full_range"])
    return [
        row["setting"],
        f"{row['keys_attended']:,.0f}",
        f"{row['ms_per_token']:.3g}",
        f"{low:.3g} to {high:.3g}",
        f"{row['tokens_per_second']:,.1f}",
        against,
    ]


def _prefill_cells(row: Mapping[str, Any], wide: bool) -> list[str]:
    del wide
    low, high = row["tokens_per_second_range"]
    return [row["setting"], f"{row['tokens_per_second']:,.0f}", f"{low:,.0f} to {high:,.0f}"]


_DECODE_HEADER = ("attention", "keys", "ms/token", "range", "tokens/s", "to full")
_PREFILL_HEADER = ("attention", "tokens/s", "range")
_TABLES = (
    ("decode", "Decoding", _DECODE_HEADER, _decode_cells),
    ("prefill", "Prefill", _PREFILL_HEADER, _prefill_cells),
)


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    console = rich.console.Console()
    first = rows[0]
    for measured, title, header, cells in _TABLES:
        table = rich.table.Table(
            title=f"{title}: {first['model']} {first['dtype']}, batch {first['batch']}",
            box=rich.box.SIMPLE_HEAD,
        )
        for name in ("context", *header):
            table.add_column(name, justify="left" if name == "attention" else "right")
        context = None
        for row in rows:
            if row["measured"] != measured:
                continue
            if context not in (None, row["context"]):
                table.add_section()
            table.add_row(
                "" if context == row["context"] else f"{row['context']:,}", *cells(row, wide=False)
            )
            context = row["context"]
        console.print(table)
    console.print(
        f"{first['device']}, jax {first['versions']['jax']}; medians and ranges of {first['n']} rounds in turn.",
        style="dim",
        highlight=False,
    )


def _report(rows: Sequence[Mapping[str, Any]]) -> str:
    from jaxtopk.analysis import report

    first = rows[0]
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    blocks: dict[str, list[report.Block]] = {}
    captions = {
        "decode": "A step is one token of every sequence: ms/token is its time, tokens/s counts all sequences. keys: in the "
        "softmax, mean over layers and steps; exact Top-k scores all keys to find them. to full: speed against full "
        "attention, round by round, median and range.",
        "prefill": "Tokens of all prompts by the time until the logits of their first new tokens are there.",
    }
    for measured, _, header, cells in _TABLES:
        blocks[measured] = [
            report.Table(
                header=("context", *header),
                rows=[
                    (f"{row['context']:,}", *cells(row, wide=True))
                    for row in rows
                    if row["measured"] == measured
                ],
                caption=captions[measured],
            )
        ]
    how = _HOW.format(rounds=first["n"], new_tokens=first["new_tokens"])
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    made = (
        f"{first['device']} ({first['platform']}, {first['cores']} cores), {versions}, commit {first['commit']}, "
        f"{first['date']}: {first['command']}"
    )
    figure = report.Figure(
        svg=_figure(rows),
        caption="Tokens a second by context: medians, and the range of the rounds as a band.",
    )
    return report.render(
        "Speed by context and attention",
        f"{first['model']} in {first['dtype']} on {first['device']}, batch {first['batch']}, "
        f"at context{'s' if len(contexts) > 1 else ''} {', '.join(f'{context:,}' for context in contexts)}.",
        [
            report.Section(heading="Speed by context", blocks=[figure]),
            report.Section(heading="Decoding", blocks=blocks["decode"]),
            report.Section(heading="Prefill", blocks=blocks["prefill"]),
            report.Section(
                heading="How this was made", blocks=[report.Text(text=how), report.Text(text=made)]
            ),
        ],
    )


def _figure(rows: Sequence[Mapping[str, Any]]) -> str:
    from jaxtopk.analysis import plots

    panels = []
    for measured, title, _, _ in _TABLES:
        of_kind = sorted(
            (row for row in rows if row["measured"] == measured), key=lambda row: row["context"]
        )
        curves = []
        for name in dict.fromkeys(row["setting"] for row in of_kind):
            points = [row for row in of_kind if row["setting"] == name]
            curves.append(
                plots.Curve(
                    label=name,
                    x=[float(row["context"]) for row in points],
                    y=[row["tokens_per_second"] for row in points],
                    low=[row["tokens_per_second_range"][0] for row in points],
                    high=[row["tokens_per_second_range"][1] for row in points],
                )
            )
        panels.append(
            plots.Panel(
                curves=curves,
                x_label="context [tokens]",
                y_label="tokens a second",
                title=title,
                ratios=False,
            )
        )
    return plots.draw(panels)
