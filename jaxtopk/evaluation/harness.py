"""An evaluation: tasks x lengths x attention settings, resumable, with each sample prefilled once."""

import dataclasses
import datetime
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from jaxtopk.analysis.provenance import provenance
from jaxtopk.analysis.run_folder import RunFolder, jsonl
from jaxtopk.data.tokenizer import Tokenizer
from jaxtopk.decoding.generate import Completion
from jaxtopk.evaluation.batches import Batch, cut_batches, draw, drawn_ahead, own_indices
from jaxtopk.evaluation.clock import Clock
from jaxtopk.evaluation.records import Records, Row
from jaxtopk.evaluation.replies import Decoder, choose_batch
from jaxtopk.evaluation.settings import Setting, check_settings, keys_attended
from jaxtopk.evaluation.tasks.base import AnyTask, Sample, Task, TokenSample, TokenTask
from jaxtopk.models.decoder_lm.modeling import DecoderLM

_TAIL = 240  # characters of a prompt's end that a row keeps


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is evaluated: the contents of config.json.

    A run may go on in a folder whose config has fewer tasks, lengths or samples; all else has to agree.

    Args:
      model: its name, as `load_pretrained` takes it.
      tasks: their names.
      lengths: tokens that prompt and reply may take.
      samples: of each task and length.
      settings: decoded side by side.
      seed: of the samples.
      chat: give each prompt as a user's message, through the model's chat template.
      dtype: of parameters and cache.
      made_with: what else the tasks were made with, such as the haystack's name.

    Raises:
      ValueError: a number is out of its range, or an entry is there twice; names it.
    """

    model: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    settings: tuple[Setting, ...]
    seed: int = 0
    chat: bool = False
    dtype: str = "float32"
    made_with: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tasks", "lengths"):
            entries = getattr(self, name)
            if not entries:
                raise ValueError(f"{name}: got none, wanted at least one")
            for entry in (entry for entry in entries if entries.count(entry) > 1):
                raise ValueError(f"{name}: got {entry} twice, wanted each once")
        if min(self.lengths) < 1:
            raise ValueError(f"lengths: got {min(self.lengths)}, wanted at least 1")
        if self.samples < 1:
            raise ValueError(f"samples: got {self.samples}, wanted at least 1")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, wanted at least 0")
        check_settings(self.settings)


def evaluate(
    model: DecoderLM,
    tokenizer: Tokenizer,
    tasks: Sequence[AnyTask],
    config: EvaluationConfig,
    folder: RunFolder,
    *,
    batch: int | None = None,
    mesh: Mesh | None = None,
    part: int = 0,
    parts: int = 1,
    minutes: float | None = None,
    on_progress: Callable[[int, int, str], Any] | None = None,
) -> dict[str, float]:
    """Decodes and scores every sample that the folder does not hold yet, and appends its rows; see `records`.

    Samples are drawn by a thread, ahead of the device. Decoding is greedy, to the task's stop strings or an end token.
    A sample's neighbours in its batch do not depend on what was done before, so a resumed run ends with the rows of one that
    was never stopped.

    Args:
      model: as loaded; its strategy does not matter.
      tasks: those of `config.tasks`, in the same order.
      folder: receives config.json, results.jsonl (results.1.jsonl for part 1) and sessions.jsonl: what made them, when, and
        where the time went.
      batch: sequences of a batch, each times the settings decoded together; None: see `replies.choose_batch`.
      mesh: splits batches over its data and fsdp axes; devices of this process.
      part, parts: this process takes every `parts`-th sample, from the `part`-th on.
      minutes: stop after the batch in which so many are over, to be called again; None: go on to the end.
      on_progress: called with samples done, samples in all, and what is being decoded.

    Returns:
      Seconds: "prefill"; "decode", the search for stop strings included; "host": waiting for samples, scoring, writing;
      "compile"; "total". And "drawing", what the thread took beside the others.

    Raises:
      ValueError: bad input, found before any decoding: a length beyond the model's context or too short for a task, a sample
        without an answer, a batch that the mesh does not divide, a folder of another configuration.
    """
    _check(model, tasks, config, mesh, batch)
    devices = _sharing(mesh)
    clock = Clock("prefill", "decode", "host")
    begin = time.perf_counter()
    settings = [setting.name for setting in config.settings]
    draw_batch = lambda batch: draw(
        batch,
        tokenizer,
        seed=config.seed,
        chat=config.chat,
        vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
    )
    own_indices(config.samples, part, parts)
    _check_drawing(tasks, config, draw_batch)
    drawing = 0.0
    with Records(folder, config, settings=settings, part=part) as records, clock:
        decoder = Decoder(model, tokenizer, config.settings, mesh=mesh, phase=clock.phase)

        def size(length: int) -> int:
            if batch is not None:
                return batch
            # Batches of about one size: a last one that is short would be filled up to the others'.
            most = choose_batch(decoder, length, multiple=devices)
            own = -(-config.samples // parts)
            each = -(-own // -(-own // most))
            return devices * -(-each // devices)

        batches = cut_batches(
            tasks, config.lengths, samples=config.samples, size=size, part=part, parts=parts
        )
        missing = lambda batch: [
            index
            for index in batch.indices
            if (batch.task.name, batch.length, index) not in records.done
        ]
        total = sum(len(batch.indices) for batch in batches)
        done = total - sum(len(missing(batch)) for batch in batches)
        left = [batch for batch in batches if missing(batch)]
        room = max((task.reply_tokens for task in tasks if isinstance(task, Task)), default=0)
        session = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{part}"
        _note(folder, {"session": session, "part": part, "parts": parts, **provenance()})
        show = on_progress or (lambda *unused: None)
        show(done, total, "drawing samples")
        ahead = drawn_ahead(left, draw_batch)
        first = done
        while True:
            with clock.phase("host"):
                found = next(ahead, None)
            if found is None:
                break
            drawing += found.seconds
            show(done, total, f"{found.batch.task.name} at {found.batch.length}")
            wanted = set(missing(found.batch))
            replies = _decode(decoder, found.batch, found.drawn, size(found.batch.length), room)
            with clock.phase("host"):
                for drawn, of_settings in zip(found.drawn, replies, strict=True):
                    if drawn.index in wanted:
                        records.append(_rows(model, found.batch, drawn, of_settings, config))
                        done += 1
            show(done, total, f"{found.batch.task.name} at {found.batch.length}")
            if minutes is not None and time.perf_counter() - begin >= 60 * minutes:
                break
        seconds = clock.seconds | {"total": time.perf_counter() - begin, "drawing": drawing}
        ahead.close()  # drops what was drawn for a batch that is not to come
        _note(folder, {"session": session, "samples": done - first, "seconds": seconds})
    return seconds


def _check(model, tasks, config, mesh, batch) -> None:
    names = tuple(task.name for task in tasks)
    if names != config.tasks:
        raise ValueError(f"tasks: got {names}, wanted those of the config, {config.tasks}")
    context = model.config.max_positions
    if max(config.lengths) > context:
        raise ValueError(
            f"lengths: got {max(config.lengths)}, wanted at most the model's context of {context}"
        )
    devices = _sharing(mesh)
    if batch is not None and (batch < 1 or batch % devices):
        wanted = (
            "at least 1" if devices == 1 else f"a multiple of the {devices} devices of its mesh"
        )
        raise ValueError(f"batch: got {batch}, wanted {wanted}")


def _check_drawing(tasks, config, draw_batch) -> None:
    """Draws the first sample of every task and length, so that one that cannot be is found out before hours of work."""
    for length in sorted(config.lengths):
        for task in tasks:
            draw_batch(Batch(task=task, length=length, indices=(0,)))


def _sharing(mesh: Mesh | None) -> int:
    """Devices that a batch is split over."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))


def _decode(decoder, batch, drawn, size, room) -> list[list[Completion | list[int]]]:
    """Returns, by sample and setting, what the model replied, or its predictions for a token task."""
    rows = [
        *drawn,
        *[drawn[-1]] * (size - len(drawn)),
    ]  # a short batch is filled up: one compiled shape
    if isinstance(batch.task, TokenTask):
        found = decoder.predictions([row.sample for row in rows], counted=len(drawn))
    else:
        found = decoder.replies(
            [row.tokens for row in rows],
            length=batch.length,
            max_new_tokens=batch.task.reply_tokens,
            stop=batch.task.stop,
            room=room,
            counted=len(drawn),
        )
    return list(map(list, zip(*found, strict=True)))


def _rows(model, batch, drawn, replies, config) -> list[Row]:
    """Scores a sample under each setting."""
    task, sample = batch.task, drawn.sample
    rows = []
    for setting, reply in zip(config.settings, replies, strict=True):
        if isinstance(sample, TokenSample):
            visible = sample.first_label + 1
            of_reply = _token_reply(task, sample, reply)
        else:
            visible = len(drawn.tokens)
            of_reply = _text_reply(task, sample, reply)
        (attended,) = keys_attended(setting.strategy, model.config, [visible])
        rows.append(
            {
                "task": task.name,
                "length": batch.length,
                "index": drawn.index,
                "seed": config.seed,
                "setting": setting.name,
                "ratio": setting.ratio,
                "topk": setting.topk,
                "metric": task.metric,
                "aggregation": task.aggregation,
                "wording": task.wording,
                "prompt_tokens": visible if isinstance(sample, TokenSample) else len(drawn.tokens),
                "keys_visible": visible,
                "keys_attended": attended,
                **of_reply,
            }
        )
    return rows


def _text_reply(task: Task, sample: Sample, reply: Completion) -> Row:
    return {
        "score": float(task.score(sample, reply.text)),
        "reply": reply.text,
        "finish": reply.finish,
        "new_tokens": len(reply.tokens),
        "answers": sample.answers,
        "depth": sample.depth,
        "meta": dict(sample.meta),
        "prompt_tail": sample.text[-_TAIL:],
    }


def _token_reply(task: TokenTask, sample: TokenSample, predictions: list[int]) -> Row:
    asked = [
        (label, got) for label, got in zip(sample.labels, predictions, strict=True) if label >= 0
    ]
    return {
        "score": float(task.score(sample, predictions)),
        "reply": " ".join(str(got) for _, got in asked),
        "finish": "length",
        "new_tokens": len(asked),
        "answers": [str(label) for label, _ in asked],
        "depth": None,
        "meta": {},
        "prompt_tail": "",
    }


def sessions(folder: RunFolder) -> list[Row]:
    """Reads what made the rows: an entry at the start of each run, and one with its seconds where it came to its end."""
    path = folder.path / "sessions.jsonl"
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # torn: its run was killed at this very moment
            continue
    return entries


def _note(folder: RunFolder, entry: Row) -> None:
    path = folder.path / "sessions.jsonl"
    text = jsonl([entry])
    with path.open("a+b") as file:
        # After a run that was killed in the middle of a line, begin a new one.
        if file.tell() and path.read_bytes()[-1:] != b"\n":
            text = "\n" + text
        file.write(text.encode())


__all__ = ["EvaluationConfig", "evaluate", "sessions"]
