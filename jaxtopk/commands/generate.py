"""`jaxtopk generate`: continues prompts with a language model, under full or Top-k attention."""

import dataclasses
import pathlib
import sys
import time
import typing
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from jaxtopk.commands.options import AttentionOptions, ModelOptions
from jaxtopk.commands.progress import progress_bar

if typing.TYPE_CHECKING:
    from jaxtopk.decoding.generate import Completion

Flag = tyro.conf.FlagCreatePairsOff


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """Continues prompts with a language model, under full or Top-k attention.

    Prompts come as plain arguments, from --prompt-file, or from standard input. The new text goes to standard output,
    everything else to standard error.
    """

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to continue, as one batch."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]")] = ()
    """The same, as a flag."""
    prompt_file: pathlib.Path | None = None
    """A UTF-8 text file that is one prompt; - reads standard input."""
    chat: Flag[bool] = False
    """Take each prompt for a user's message, and render it by the model's chat template."""
    max_new_tokens: int = 128
    """Most tokens to draw for a prompt."""
    temperature: float = 0.0
    """0 takes the most likely token; above, tokens are drawn at random."""
    top_p: float = 1.0
    """Draw from the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Draw from tokens that have at least this share of the largest probability."""
    seed: int = 0
    """With the prompt it fixes what is drawn."""
    stop: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]")] = ()
    """Texts that end a completion."""
    stream: Flag[bool] = False
    """Print the text as it comes; for one prompt."""
    out: pathlib.Path | None = None
    """Folder to receive config.json, results.jsonl and report.html; they appear once the run is complete."""
    model: tyro.conf.OmitArgPrefixes[ModelOptions] = ModelOptions()
    attention: tyro.conf.OmitArgPrefixes[AttentionOptions] = AttentionOptions()

    def run(self) -> None:
        """Generates and prints; writes the folder if asked.

        Raises:
          ValueError: bad input, found before the model is loaded where that is possible.
          FileNotFoundError: the prompt file or the model does not exist.
        """
        prompts = self._read_prompts()
        if self.stream and len(prompts) != 1:
            raise ValueError(f"stream: got {len(prompts)} prompts, wanted one")
        folder = None
        if self.out is not None:
            from jaxtopk.analysis.run_folder import RunFolder

            folder = RunFolder(self.out)
            folder.check()
        # JAX and the model code are imported here, so that --help and mistakes in the flags answer at once.
        with progress_bar() as progress:
            task = progress.add_task("starting", total=None)
            from jaxtopk.decoding import loops
            from jaxtopk.decoding.sampling import SamplingConfig

            strategy = self.attention.build()
            sampling = SamplingConfig(
                temperature=self.temperature, top_p=self.top_p, min_p=self.min_p
            )
            loops.check_new_tokens(self.max_new_tokens)
            self.model.select_device()
            progress.update(task, description=f"loading {self.model.model}")
            model, tokenizer = self.model.load(strategy)
            progress.update(task, description="reading the prompt")
            completions, timing = self._complete(
                model, tokenizer, prompts, sampling, progress, task
            )
        self._print(prompts, completions)
        sys.stderr.write(timing.summary() + "\n")
        if folder is not None:
            rows = self._rows(prompts, completions, strategy, timing)
            folder.write_config(self)
            folder.write_results(rows)
            folder.write_report(_report(rows))

    def _read_prompts(self) -> list[str]:
        prompts = [*self.prompts, *self.prompt]
        from_stdin = self.prompt_file == pathlib.Path("-")
        if self.prompt_file is not None and not from_stdin:
            if not self.prompt_file.is_file():
                raise FileNotFoundError(
                    f"prompt_file: got {self.prompt_file}, wanted an existing file"
                )
            prompts.append(
                _decode(self.prompt_file.read_bytes(), f"prompt_file {self.prompt_file}")
            )
        elif from_stdin or (not prompts and not sys.stdin.isatty()):
            prompts.append(_decode(sys.stdin.buffer.read(), "standard input"))
        if not prompts:
            raise ValueError("prompt: got none, wanted a text, --prompt-file or standard input")
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {index}: got an empty one, wanted at least one token")
        return prompts

    def _complete(
        self, model, tokenizer, prompts, sampling, progress, task
    ) -> "tuple[list[Completion], _Timing]":
        from jaxtopk.decoding.generate import complete

        begin = time.perf_counter()
        marks: list[tuple[int, float]] = []  # tokens drawn by the longest sequence, and when

        def on_progress(drawn: int) -> None:
            marks.append((drawn, time.perf_counter()))
            if self.stream:
                progress.stop()  # the text itself shows the progress
            else:
                progress.update(
                    task, description="decoding", total=self.max_new_tokens, completed=drawn
                )

        def on_text(index: int, piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        completions = complete(
            model,
            tokenizer,
            prompts,
            max_new_tokens=self.max_new_tokens,
            sampling=sampling,
            seed=self.seed,
            stop=self.stop,
            chat=self.chat,
            on_text=on_text if self.stream else None,
            on_progress=on_progress,
        )
        new_tokens = sum(len(completion.tokens) for completion in completions)
        return completions, _Timing.of(new_tokens, begin, time.perf_counter(), marks)

    def _print(self, prompts: Sequence[str], completions: "Sequence[Completion]") -> None:
        if self.stream:
            sys.stdout.write("\n")
        elif len(completions) == 1:
            sys.stdout.write(completions[0].text + "\n")
        else:
            for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
                sys.stdout.write(f"--- {index}: {_shorten(prompt)}\n{completion.text}\n")

    def _rows(self, prompts, completions, strategy, timing: "_Timing") -> list[dict[str, Any]]:
        from jaxtopk.analysis.provenance import provenance

        made = provenance()
        return [
            {
                "prompt": prompt,
                "completion": completion.text,
                "finish": completion.finish,
                "prompt_tokens": completion.prompt_tokens,
                "new_tokens": len(completion.tokens),
                "tokens": completion.tokens,
                "attention": strategy,
                "batch": len(prompts),
                "batch_seconds": timing.seconds,
                "batch_tokens_per_second": timing.tokens_per_second,
                **made,
            }
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Timing:
    """How long a batch took."""

    new_tokens: int
    seconds: float  # everything after loading, compilation included
    tokens_per_second: (
        float | None
    )  # of the batch, after the first slice of the loop; None: there was no other

    @classmethod
    def of(
        cls, new_tokens: int, begin: float, end: float, marks: Sequence[tuple[int, float]]
    ) -> "_Timing":
        # The first slice of the loop compiles it, so the rate is taken from where that slice ended.
        rate = None
        if len(marks) > 2 and marks[-1][1] > marks[1][1]:
            share = (marks[-1][0] - marks[1][0]) / max(marks[-1][0], 1)
            rate = share * new_tokens / (marks[-1][1] - marks[1][1])
        return cls(new_tokens=new_tokens, seconds=end - begin, tokens_per_second=rate)

    def summary(self) -> str:
        text = f"{self.new_tokens} tokens in {self.seconds:.1f} s with compilation"
        if self.tokens_per_second is None:
            return text
        return f"{text}; {self.tokens_per_second:.1f} tokens/s once compiled"


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: got bytes that are no UTF-8 at {error.start}, wanted UTF-8 text"
        ) from None


def _shorten(text: str, width: int = 72) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def _report(rows: Sequence[dict[str, Any]]) -> str:
    from jaxtopk.analysis import report

    first = rows[0]
    header = ("prompt", "prompt tokens", "new tokens", "ended by")
    table = report.Table(
        header=header,
        rows=[
            (
                _shorten(row["prompt"], 48),
                str(row["prompt_tokens"]),
                str(row["new_tokens"]),
                row["finish"],
            )
            for row in rows
        ],
        caption=f"{first['batch_seconds']:.1f} s for the batch, compilation included, on {first['device']}.",
    )
    examples = [
        report.Examples(context=row["prompt"], texts=[("text", row["completion"])]) for row in rows
    ]
    return report.render(
        "Generated text",
        f"{len(rows)} completion{'s' if len(rows) > 1 else ''} under {first['attention']}.",
        [
            report.Section(heading="Overview", blocks=[table]),
            report.Section(heading="Texts", blocks=examples),
        ],
    )
