"""Decodes the same weights here and with `transformers`, in turn, and prints tokens per second of both.

Both sides decode greedily, batch 1, float32, after the same prompt, and must write the same tokens. Rounds alternate, so
that whatever else the machine does falls on all alike; medians are compared. `transformers` is measured with both of its
caches, and the faster one counts.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import rich.box
import rich.console
import rich.progress
import rich.table
import tyro

from experiments import command
from experiments.bench import peer_environment
from jaxtopk.analysis.run_folder import RunFolder

_WORKER = pathlib.Path(__file__).with_name("transformers_worker.py")
_PEERS = ("transformers, dynamic cache", "transformers, static cache")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tokens per second of CPU decoding, against `transformers` with the same weights."""

    model: str = "smollm2-135m"
    """A preset, folder, .gguf file or hub id; a plain Llama."""
    context: int = 1024
    """Tokens of the prompt."""
    steps: int = 32
    """Tokens decoded a round."""
    rounds: int = 5
    """Rounds that count, after one that does not."""
    topk_ratio: float = 0.1
    """Share of keys that the Top-k side keeps."""
    transformers_python: pathlib.Path | None = None
    """A Python that has torch and transformers; by default an environment is made in .venv-transformers."""
    out: pathlib.Path = pathlib.Path("runs/bench")
    """Folder for config.json and results.jsonl."""


def main() -> None:
    """Runs from the command line; bad input ends in one line and exit code 2."""
    arguments = tyro.cli(Arguments, prog="python -m experiments.bench.run")
    with command.bad_input_in_one_line("bench"):
        run(arguments)


def run(arguments: Arguments) -> list[dict]:
    """Measures, prints and writes; returns the rows of results.

    Raises:
      ValueError: an argument is out of its range.
      FileNotFoundError: there is no Python with transformers, and none could be made.
      RuntimeError: the two sides did not write the same tokens, so they did not do the same work.
    """
    for name in ("context", "steps", "rounds"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name}: got {getattr(arguments, name)}, wanted at least 1")
    folder = RunFolder(arguments.out)
    folder.check()
    python = arguments.transformers_python or peer_environment.find_or_make(
        pathlib.Path(".venv-transformers")
    )
    if not peer_environment.works(python):
        raise FileNotFoundError(
            f"transformers_python: got {python}, wanted a Python that imports torch and transformers"
        )

    import jax

    jax.config.update("jax_platforms", "cpu")
    import jax.numpy as jnp

    from experiments.bench import hf_folder
    from jaxtopk import load_pretrained
    from jaxtopk.analysis.provenance import provenance
    from jaxtopk.data.corpora import shakespeare_plays

    model, tokenizer = load_pretrained(arguments.model, dtype=jnp.float32)
    if arguments.context + arguments.steps > model.config.max_positions:
        raise ValueError(
            f"context: got {arguments.context} and {arguments.steps} steps, wanted at most {model.config.max_positions}"
        )
    prompt = tokenizer.encode(shakespeare_plays()[0].text)[: arguments.context]
    with tempfile.TemporaryDirectory() as temporary:
        hf_folder.write(model, pathlib.Path(temporary))
        sides = _our_sides(model, prompt, arguments)
        with _peer(python, pathlib.Path(temporary), prompt, arguments.steps) as (
            ask,
            peer_versions,
        ):
            sides |= {name: functools.partial(ask, name.split()[1]) for name in _PEERS}
            seconds = _take_turns(sides, arguments)
    rates = {name: [arguments.steps / one for one in each] for name, each in seconds.items()}
    best_peer = max(_PEERS, key=lambda name: statistics.median(rates[name]))
    common = provenance() | {
        "study": "bench",
        "model": arguments.model,
        "seed": 0,
        "n": arguments.rounds,
        "context": arguments.context,
        "steps": arguments.steps,
        "dtype": "float32",
        "batch": 1,
        "transformers": peer_versions,
    }
    rows = [
        common
        | {
            "side": name,
            "tokens_per_second": statistics.median(rate),
            "tokens_per_second_range": [min(rate), max(rate)],
            "ratio_to_transformers": statistics.median(rate) / statistics.median(rates[best_peer]),
        }
        for name, rate in rates.items()
    ]
    folder.write_config(arguments)
    folder.write_results(rows)
    _print(rows, arguments)
    return rows


def _our_sides(model, prompt: list[int], arguments: Arguments) -> dict[str, Callable[[], dict]]:
    """Returns a function a strategy, each decoding `steps` tokens after the prompt and telling {seconds, tokens}."""
    import jax
    import jax.numpy as jnp

    from jaxtopk.attention import FullAttention, TopKAttention
    from jaxtopk.decoding.loops import prefill

    @functools.partial(jax.jit, donate_argnames="cache")
    def decode(model, token, cache):
        def step(state, _):
            token, cache = state
            logits, cache = model.decode(token, cache)
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return (token, cache), token

        (_, after), tokens = jax.lax.scan(step, (token, cache), None, length=arguments.steps)
        return tokens[:, 0], dataclasses.replace(after, lengths=cache.lengths)

    unstacked = model.unstacked()
    sides: dict[str, Callable[[], dict]] = {}
    for name, strategy in (
        ("jaxtopk, full attention", FullAttention()),
        (
            f"jaxtopk, top-k {100 * arguments.topk_ratio:g}%",
            TopKAttention(topk_ratio=arguments.topk_ratio),
        ),
    ):
        one_left = model.with_attention(
            TopKAttention(topk_ratio=1.0)
        )  # prefills all but the last token
        state = {"cache": prefill(one_left, [prompt], new_tokens=arguments.steps).cache}
        token = jnp.asarray(prompt[-1:], jnp.int32)

        def side(model=unstacked.with_attention(strategy), state=state, token=token) -> dict:
            jax.block_until_ready(state["cache"])
            begin = time.perf_counter()
            tokens, state["cache"] = decode(model, token, state["cache"])
            tokens = jax.device_get(tokens).tolist()
            return {"seconds": time.perf_counter() - begin, "tokens": tokens}

        sides[name] = side
    return sides


@contextlib.contextmanager
def _peer(
    python: pathlib.Path, folder: pathlib.Path, prompt: list[int], steps: int
) -> Iterator[tuple[Callable[[str], dict], dict]]:
    """Starts the other side; yields what asks it for one decode, by kind of cache, and its versions."""
    worker = subprocess.Popen(
        [str(python), str(_WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    questions, answers = worker.stdin, worker.stdout
    assert questions is not None  # both are pipes
    assert answers is not None

    def ask(line: str) -> dict:
        questions.write(line + "\n")
        answer = answers.readline()
        if not answer:
            raise RuntimeError(
                f"transformers: ended with exit code {worker.wait()}; its message is above"
            )
        return json.loads(answer)

    try:
        yield ask, ask(json.dumps({"folder": str(folder), "prompt": prompt, "steps": steps}))
    finally:
        questions.close()
        worker.wait()
        answers.close()


def _take_turns(
    sides: dict[str, Callable[[], dict]], arguments: Arguments
) -> dict[str, list[float]]:
    """Runs every side once a round; returns the seconds of the rounds that count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    written: dict[str, list[int]] = {}
    with rich.progress.Progress(console=rich.console.Console(stderr=True)) as progress:
        bar = progress.add_task("decoding in turn", total=(arguments.rounds + 1) * len(sides))
        for round_ in range(arguments.rounds + 1):
            for name, side in sides.items():
                answer = side()
                written[name] = answer["tokens"]
                if round_:  # the first one compiles, and reads the weights into memory
                    seconds[name].append(answer["seconds"])
                progress.advance(bar)
    same = [written[name] for name in sides if "top-k" not in name]
    if any(tokens != same[0] for tokens in same):
        raise RuntimeError(
            f"tokens: got {same}, wanted the same from every side with full attention"
        )
    return seconds


def _print(rows: list[dict], arguments: Arguments) -> None:
    table = rich.table.Table(
        title=f"{arguments.model} float32, {rows[0]['cores']} cores, context {arguments.context}, batch 1",
        box=rich.box.SIMPLE_HEAD,
    )
    for name in ("side", "tokens/s", "range", "against transformers"):
        table.add_column(name, justify="left" if name == "side" else "right")
    for row in rows:
        low, high = row["tokens_per_second_range"]
        table.add_row(
            row["side"],
            f"{row['tokens_per_second']:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{row['ratio_to_transformers']:.2f}x",
        )
    console = rich.console.Console()
    console.print(table)
    peer = rows[0]["transformers"]
    console.print(
        f"{rows[0]['device']}, jax {rows[0]['versions']['jax']}, torch {peer['torch']}, transformers {peer['transformers']}; "
        f"medians of {arguments.rounds} rounds of {arguments.steps} tokens, in turn.",
        style="dim",
        highlight=False,
    )


if __name__ == "__main__":
    main()
