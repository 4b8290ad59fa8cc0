"""What is decoded together: samples of one task and length, drawn and tokenised ahead of the device by a thread."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

from jaxtopk.data.tokenizer import Tokenizer
from jaxtopk.evaluation.tasks.base import AnyTask, Sample, Task, TokenSample, TokenTask

_AHEAD = 2  # batches drawn before they are needed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one task at one length.

    Args:
      length: tokens that prompt and reply may take.
      indices: of the samples.
    """

    task: AnyTask
    length: int
    indices: tuple[int, ...]


class Drawn(NamedTuple):
    """A sample as the model reads it: `tokens` is the prompt, or of a token sample the whole sequence."""

    index: int
    sample: Sample | TokenSample
    tokens: tuple[int, ...]


def own_indices(samples: int, part: int = 0, parts: int = 1) -> range:
    """Returns which of `samples` indices fall to one of several processes: those that leave `part` as a remainder.

    Raises:
      ValueError: `part` is not 0 to `parts` - 1.
    """
    if not 0 <= part < parts:
        raise ValueError(f"part: got {part} of {parts}, wanted 0 to {parts - 1}")
    return range(part, samples, parts)


def cut_batches(
    tasks: Sequence[AnyTask],
    lengths: Sequence[int],
    *,
    samples: int,
    size: Callable[[int], int],
    part: int = 0,
    parts: int = 1,
) -> list[Batch]:
    """Cuts all samples into batches: shortest length first, so that what compiles together runs together.

    The same arguments give the same batches, whatever was done before: a sample has the same neighbours in a run that was
    resumed as in one that was not.

    Args:
      samples: of each task and length; a task with fewer gives all it has.
      size: samples of a batch, by length.
      part, parts: see `own_indices`.
    """
    batches = []
    for length in sorted(lengths):
        for task in tasks:
            count = samples if task.size is None else min(samples, task.size)
            indices = own_indices(count, part, parts)
            step = size(length)
            batches += [
                Batch(task=task, length=length, indices=tuple(indices[start : start + step]))
                for start in range(0, len(indices), step)
            ]
    return batches


def encode(tokenizer: Tokenizer, sample: Sample, *, chat: bool) -> list[int]:
    """Returns a sample as the model reads it: text to continue, or with `chat` a user's message and the reply's beginning.

    Raises:
      ValueError: the model has no chat template.
    """
    if not chat:
        return tokenizer.encode(sample.text, add_special_tokens=True)
    text = tokenizer.apply_chat_template([{"role": "user", "content": sample.prompt}])
    return tokenizer.encode(text + sample.reply_start, add_special_tokens=False)


def draw(
    batch: Batch, tokenizer: Tokenizer, *, seed: int, chat: bool, vocab_size: int
) -> list[Drawn]:
    """Draws and tokenises the samples of a batch.

    Raises:
      ValueError: the length is too short for the task, or a sample has no answer; names the task, length and index.
    """
    drawn = []
    for index in batch.indices:
        task = batch.task
        with _named(batch, index):
            if isinstance(task, TokenTask):
                tokens = task.sample(
                    index, seed=seed, target_tokens=batch.length, vocab_size=vocab_size
                )
                drawn.append(Drawn(index, tokens, tokens.tokens))
                continue
            assert isinstance(task, Task)
            sample = task.sample(
                index,
                seed=seed,
                target_tokens=batch.length,
                count_tokens=lambda sample: len(encode(tokenizer, sample, chat=chat)),
            )
            if not sample.answers or not all(answer.strip() for answer in sample.answers):
                raise ValueError(
                    f"answers: got {sample.answers}, wanted strings that are not empty"
                )
            drawn.append(Drawn(index, sample, tuple(encode(tokenizer, sample, chat=chat))))
    return drawn


@contextlib.contextmanager
def _named(batch: Batch, index: int):
    try:
        yield
    except ValueError as error:
        where = f"{batch.task.name}, length {batch.length}, sample {index}"
        raise ValueError(f"{where}: {error}") from error


class Ahead(NamedTuple):
    """A batch whose samples are drawn; `seconds` is what drawing took the thread."""

    batch: Batch
    drawn: list[Drawn]
    seconds: float


def drawn_ahead(
    batches: Sequence[Batch], draw_batch: Callable[[Batch], list[Drawn]]
) -> Generator[Ahead]:
    """Yields batches in order; a thread draws the next ones while the caller works on one."""

    def timed(batch: Batch) -> Ahead:
        begin = time.perf_counter()
        drawn = draw_batch(batch)
        return Ahead(batch, drawn, time.perf_counter() - begin)

    # One thread: the tokenizer is not promised to be safe in several.
    executor = concurrent.futures.ThreadPoolExecutor(1)
    try:
        waiting: collections.deque[concurrent.futures.Future[Ahead]] = collections.deque()
        for batch in batches:
            waiting.append(executor.submit(timed, batch))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


__all__ = ["Ahead", "Batch", "Drawn", "cut_batches", "draw", "drawn_ahead", "encode", "own_indices"]
