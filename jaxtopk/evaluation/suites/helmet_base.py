"""What HELMET's sub-tasks share: files for several lengths, and draws that its own programs would make."""

import dataclasses
import hashlib
import pathlib
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxtopk.evaluation.suites.base import SuiteTask
from jaxtopk.evaluation.suites.files import Records, Row

# Prompt lengths that the suite has files or sizes for, tokens; the place of a length is that of its size in other tables.
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
SEED = 42  # of all draws
SHOTS = 2
SAMPLES = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """A file and which of its objects are asked, in order."""

    records: Records
    chosen: Sequence[int]

    def __getitem__(self, index: int) -> Row:
        if index >= len(self.chosen):  # files of other lengths may hold fewer
            raise ValueError(
                f"{self.records.path}: got {len(self.chosen)} samples, wanted {index + 1}"
            )
        return self.records[self.chosen[index]]

    @property
    def keys(self) -> list[str]:
        """What was noted of each sample."""
        return [self.records.notes[place] for place in self.chosen]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HelmetTask(SuiteTask):
    """A sub-task of HELMET, with its metric and draws, and prompts in our own words unless said otherwise.

    An over-long context loses its end.

    Args:
      category: the mean that the score goes into.
      longest_reply: tokens.
      one_line: a reply ends with its line.
    """

    suite: str = "helmet"
    category: str
    longest_reply: int
    one_line: bool = False

    @property
    def reply_tokens(self) -> int:
        """See `Task.reply_tokens`."""
        return self.longest_reply

    @property
    def stop(self) -> tuple[str, ...]:
        """See `Task.stop`."""
        return ("\n",) if self.one_line else ()

    @property
    def meta(self) -> tuple[tuple[str, str], ...]:
        """Of every sample."""
        return (("category", self.category),)

    def opening(self, start: str) -> str:
        """Returns how the reply begins: the suite begins none for a chat model."""
        return "" if self.chat else start

    @property
    def joint(self) -> str:
        """What stands before the reply."""
        return "" if self.chat else "\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesTask(HelmetTask):
    """A sub-task with a file for each length.

    Args:
      paths: the file of each length that is there.
      drawn: reads a file; each only once.
    """

    paths: Mapping[int, pathlib.Path]
    drawn: Callable[[pathlib.Path], Drawn]

    @property
    def size(self) -> int:
        """See `AnyTask.size`; of the file for the smallest length."""
        return len(self.drawn(self.paths[min(self.paths)]).chosen)

    def file(self, target_tokens: int) -> Drawn:
        """Returns the file for this length."""
        return self.drawn(self.paths[nearest_length(self.paths, target_tokens)])

    def row(self, index: int, target_tokens: int) -> Row:
        """Returns the object for sample `index` at this length."""
        return self.file(target_tokens)[index]


def nearest_length(lengths: Sequence[int] | Mapping[int, object], target_tokens: int) -> int:
    """Returns the largest of `lengths` that is not over the target, or else the smallest."""
    return max((size for size in lengths if size <= target_tokens), default=min(lengths))


def shuffled(count: int, seed: int) -> list[int]:
    """Returns 0 to count - 1 in the order of the data-set library that the suite uses."""
    return np.random.default_rng(seed).permutation(count).tolist()


def seed_of(text: str) -> int:
    """Returns the seed that the suite gives to a question of its own."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 2**31


def pick_examples(keys: Sequence[str], order: Sequence[int]) -> list[int]:
    """Returns the first `SHOTS` places of `order` whose keys differ from each other."""
    chosen: dict[str, int] = {}
    for place in order:
        if len(chosen) < SHOTS:
            chosen.setdefault(keys[place], place)
    return list(chosen.values())


def draw_keys(records: Records) -> Drawn:
    """Draws questions by their notes, None for those left out; each question comes with all its lines.

    The lines of a question differ in where the right document stands.

    Raises:
      ValueError: all are left out.
    """
    keys = sorted({key for key in records.notes if key is not None})
    if not keys:
        raise ValueError(f"{records.path}: got no question that is asked, wanted at least one")
    asked = set(random.Random(SEED).sample(keys, min(SAMPLES, len(keys))))
    chosen = [place for place, key in enumerate(records.notes) if key in asked]
    return Drawn(records=records, chosen=chosen)


def present_files(
    file: Callable[[int], pathlib.Path], sizes: Sequence[int]
) -> dict[int, pathlib.Path]:
    """Returns the files that are there, by length.

    Args:
      file: name of the file of a size.
      sizes: one for each of `LENGTHS`.
    """
    paths = {length: file(size) for length, size in zip(LENGTHS, sizes, strict=True)}
    return {length: path for length, path in paths.items() if path.is_file()}


def examples_file(path: pathlib.Path) -> pathlib.Path:
    """Returns the file of worked examples.

    Raises:
      ValueError: it is missing.
    """
    if not path.is_file():
        raise ValueError(f"helmet: got no file {path}, wanted it for the worked examples")
    return path
