"""Multi-query associative recall: pairs of tokens, then their first tokens again, each to be followed by its second."""

import dataclasses

import numpy as np

from jaxtopk.evaluation.tasks.base import Split, TokenSample, TokenTask
from jaxtopk.evaluation.tasks.drawing import generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeRecall(TokenTask):
    """Pairs k1 v1 ... kn vn, then two-token slots of random tokens, some of which begin with a key again.

    Keys lie in [1, V/2), values in [V/2, V), and neither repeats. Slot g is drawn with a weight of g^(a - 1), so that most
    keys return early. Wanted after a returning key is its value, which does not stand there.

    Source: Zoology, arXiv:2312.04927.

    Args:
      pairs: n; None: one for each sixteen tokens.
      power: a.
    """

    pairs: int | None = None
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.pairs is not None and self.pairs < 1:
            raise ValueError(f"pairs: got {self.pairs}, wanted at least 1")
        if not self.power > 0:
            raise ValueError(f"power: got {self.power}, wanted a number above 0")

    @property
    def name(self) -> str:
        """See `AnyTask.name`."""
        return "mqar"

    def sample(
        self,
        index: int,
        *,
        seed: int,
        target_tokens: int,
        vocab_size: int,
        split: Split = "test",
    ) -> TokenSample:
        """Returns `target_tokens` tokens, one less where that is odd.

        Raises:
          ValueError: the length is under four tokens a pair, or not below the vocabulary.
        """
        length = target_tokens // 2 * 2
        pairs = max(length // 16, 1) if self.pairs is None else self.pairs
        if length < 4 * pairs:
            raise ValueError(
                f"mqar: target_tokens got {target_tokens}, wanted at least {4 * pairs} for {pairs} pairs"
            )
        if length >= vocab_size:
            raise ValueError(
                f"mqar: target_tokens got {target_tokens}, wanted fewer than the {vocab_size} tokens of the vocabulary"
            )
        rng = generator(seed, index, split, task=self.name)
        half = vocab_size // 2
        keys = rng.choice(np.arange(1, half), size=pairs, replace=False)
        values = rng.choice(np.arange(half, vocab_size), size=pairs, replace=False)
        # Random tokens are no keys: a key that returned by chance would be a question without a label.
        others = np.setdiff1d(np.arange(1, vocab_size), keys)
        tokens = rng.choice(others, size=length)
        tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        slots = np.arange(1, length // 2 - pairs + 1)
        weights = slots ** (self.power - 1)
        chosen = rng.choice(len(slots), size=pairs, replace=False, p=weights / weights.sum())
        places = 2 * (pairs + chosen)
        labels = np.full(length, -1)
        tokens[places], labels[places] = keys, values
        return TokenSample(tokens=tuple(tokens.tolist()), labels=tuple(labels.tolist()))
