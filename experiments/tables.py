"""Writes the tables and figures that pages show from result files, between markers; `--check` only compares.

Run `python -m experiments.tables` after committing new results. A page holds, for each generated part,

    <!-- generated: NAME -->
    ...
    <!-- end: NAME -->

and everything between the two lines is replaced.
"""

import functools
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from experiments.kernel_latency import tables as kernel_latency
from experiments.long_decode import tables as long_decode
from experiments.quickstart import tables as quickstart
from experiments.topk_ratio import entropy_tables as topk_ratio_entropy
from experiments.topk_ratio import tables as topk_ratio
from jaxtopk.analysis.run_folder import write_text

ROOT = pathlib.Path(__file__).resolve().parents[1]


def operations() -> str:
    """The op x backend matrix: the first table of the kernels' own README.

    Raises:
      ValueError: that page has no table.
    """
    text = (ROOT / "pallas_kernels/README.md").read_text(encoding="utf-8")
    table = re.search(r"(^\|.*\n)+", text, re.MULTILINE)
    if table is None:
        raise ValueError("pallas_kernels/README.md: got no table, wanted the op x backend matrix")
    return table.group()


# Page: its generated parts.
PAGES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {
        "quickstart-figure": lambda: quickstart.figure_link("experiments/quickstart/"),
        "quickstart-summary": quickstart.summary,
        "operations": operations,
        "kernel-latency": kernel_latency.summary,
        "long-decode-figure": lambda: long_decode.figure_link("experiments/long_decode/"),
        "long-decode": long_decode.summary,
        "topk-ratio-figure": lambda: topk_ratio.figure_link("experiments/topk_ratio/"),
    },
    "experiments/quickstart/README.md": {
        "figure": lambda: quickstart.figure_link(""),
        "tables": quickstart.tables,
    },
    "experiments/kernel_latency/README.md": {
        "figures": lambda: kernel_latency.figure_links(""),
        "tables": kernel_latency.tables,
    },
    "experiments/long_decode/README.md": {
        "figure": lambda: long_decode.figure_link(""),
        "tables": long_decode.tables,
    },
    "experiments/topk_ratio/README.md": {
        "figure": lambda: topk_ratio.figure_link(""),
        "tables": topk_ratio.tables,
        "entropy-figures": lambda: topk_ratio_entropy.figure_links(""),
        "entropy-tables": topk_ratio_entropy.tables,
    },
}


class Drawing(NamedTuple):
    """A committed figure.

    digest: fingerprint of the rows it has to be drawn from; None where there are none, and so no figure.
    """

    draw: Callable[[], str]
    digest: Callable[[], str | None]


# By its file.
FIGURES: Mapping[str, Drawing] = {
    "experiments/quickstart/results/quality.svg": Drawing(
        quickstart.figure, lambda: quickstart.rows_digest() if quickstart.committed() else None
    ),
    "experiments/topk_ratio/results/ratio.svg": Drawing(topk_ratio.figure, topk_ratio.rows_digest),
    "experiments/long_decode/results/context.svg": Drawing(
        long_decode.figure, long_decode.rows_digest
    ),
    **{
        f"experiments/topk_ratio/results/{name}": Drawing(
            functools.partial(topk_ratio_entropy.figure, name), topk_ratio_entropy.rows_digest
        )
        for name in topk_ratio_entropy.FIGURES
    },
    **{
        f"experiments/kernel_latency/results/{name}": Drawing(
            functools.partial(kernel_latency.figure, name),
            functools.partial(kernel_latency.rows_digest, name),
        )
        for name in kernel_latency.FIGURES
    },
}


def between(text: str, name: str) -> str:
    """Returns what stands between the markers of `name`.

    Raises:
      ValueError: the page does not have both markers once, in order.
    """
    return _parts(text, name)[1].strip("\n")


def replace(text: str, name: str, content: str) -> str:
    """Returns the page with the part of `name` replaced; raises as `between` does."""
    before, _, after = _parts(text, name)
    return f"{before}\n{content.strip()}\n{after}"


def _parts(text: str, name: str) -> tuple[str, str, str]:
    pattern = rf"(<!-- generated: {re.escape(name)} -->)\n(.*?)(<!-- end: {re.escape(name)} -->)"
    found = list(re.finditer(pattern, text, re.DOTALL))
    if len(found) != 1:
        raise ValueError(f"markers of {name!r}: got {len(found)} pairs, wanted one")
    match = found[0]
    return text[: match.end(1)], match.group(2), text[match.start(3) :]


def pages() -> dict[pathlib.Path, str]:
    """Returns every page as it should read."""
    written = {}
    for page, parts in PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        for name, content in parts.items():
            text = replace(text, name, content())
        written[ROOT / page] = text
    return written


def stale() -> list[str]:
    """Returns the pages and figures that are not what their result files say.

    A figure is compared by the digest of the rows it was drawn from, which it carries: drawings differ from one release of
    the plotting library to the next.
    """
    old = [
        str(path.relative_to(ROOT))
        for path, text in pages().items()
        if path.read_text(encoding="utf-8") != text
    ]
    for name, drawing in FIGURES.items():
        path, digest = ROOT / name, drawing.digest()
        if digest is None:
            continue
        if not path.exists() or digest not in path.read_text(encoding="utf-8"):
            old.append(name)
    return old


def main() -> None:
    """Writes what is stale, or with `--check` lists it and exits 1."""
    old = stale()
    if sys.argv[1:] == ["--check"]:
        sys.exit("\n".join(f"stale: {name}" for name in old) if old else 0)
    if sys.argv[1:]:
        sys.exit(f"tables: error: got {' '.join(sys.argv[1:])}, wanted nothing or --check")
    for name, drawing in FIGURES.items():
        if name in old:
            write_text(ROOT / name, drawing.draw())
    for path, text in pages().items():
        write_text(path, text)
    print("\n".join(f"wrote {name}" for name in old) or "everything is up to date")


if __name__ == "__main__":
    main()
