"""What is measured: token sequences with the rows that count, cut from a text or made of a task's samples and answers."""

import dataclasses

import numpy as np

from jaxtopk.data.tokenizer import Tokenizer
from jaxtopk.evaluation.tasks.base import Task, TokenTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """One sequence.

    Args:
      group: what tables call it: the task's name, or "text".
      tokens: ids.
      measured: rows that count.
      prompt_tokens: rows before the reply, which a strategy may leave dense; 0 where there is no prompt.
    """

    group: str
    tokens: tuple[int, ...]
    measured: np.ndarray  # bool [T]
    prompt_tokens: int = 0


def text_pieces(
    text: str, tokenizer: Tokenizer, *, tokens: int, windows: int, group: str = "text"
) -> list[Piece]:
    """Cuts `windows` stretches of `tokens` tokens, evenly spread over the text, without overlap; every row counts.

    Raises:
      ValueError: the text is too short for them.
    """
    ids = tokenizer.encode(text)
    if len(ids) < windows * tokens:
        raise ValueError(
            f"text: got {len(ids)} tokens, wanted at least windows x tokens = {windows} x {tokens} = {windows * tokens}"
        )
    starts = np.linspace(0, len(ids) - tokens, windows).astype(int)
    measured = np.ones(tokens, bool)
    return [
        Piece(group=group, tokens=tuple(ids[start : start + tokens]), measured=measured)
        for start in starts
    ]


def task_pieces(
    task: Task | TokenTask,
    tokenizer: Tokenizer,
    *,
    tokens: int,
    samples: int,
    seed: int,
    vocab_size: int,
) -> list[Piece]:
    """Makes samples of a task and goes on with their right answers, so that all models and strategies read the same.

    The rows that count are those that predict a token of the answer, or a label.

    Args:
      tokens: the longest sequence, answer included.
      samples: how many; fewer where the task has fewer.
      vocab_size: of the model.

    Raises:
      ValueError: the task does not fit so few tokens.
    """
    count = samples if task.size is None else min(samples, task.size)
    if isinstance(task, TokenTask):
        return [
            _labelled(task, index, tokens=tokens, seed=seed, vocab_size=vocab_size)
            for index in range(count)
        ]
    length = lambda sample: len(tokenizer.encode(sample.text))
    pieces = []
    for index in range(count):
        sample = task.sample(index, seed=seed, target_tokens=tokens, count_tokens=length)
        prompt = tokenizer.encode(sample.text)
        # Tasks leave room for the reply; an answer that is longer still is cut off.
        answer = tokenizer.encode(" " + ", ".join(sample.answers))[: max(tokens - len(prompt), 0)]
        if not answer:
            raise ValueError(
                f"{task.name}: got a prompt of {len(prompt)} tokens, wanted room for an answer in {tokens}"
            )
        measured = np.zeros(len(prompt) + len(answer), bool)
        measured[len(prompt) - 1 : -1] = True
        pieces.append(
            Piece(
                group=task.name,
                tokens=(*prompt, *answer),
                measured=measured,
                prompt_tokens=len(prompt),
            )
        )
    return pieces


def _labelled(task: TokenTask, index: int, *, tokens: int, seed: int, vocab_size: int) -> Piece:
    sample = task.sample(index, seed=seed, target_tokens=tokens, vocab_size=vocab_size)
    measured = np.asarray(sample.labels) >= 0
    return Piece(
        group=task.name,
        tokens=tuple(sample.tokens),
        measured=measured,
        prompt_tokens=sample.first_label + 1,
    )


__all__ = ["Piece", "task_pieces", "text_pieces"]
