"""Self-contained HTML reports: sections of text, tables, figures and examples, in one file without links to others."""

import dataclasses
import html
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph."""

    text: str

    def html(self) -> str:
        """Renders the paragraph, escaped."""
        return f"<p>{_escape(self.text)}</p>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of strings under a header; the first column is a label, the others are set flush right.

    Args:
      caption: what the numbers are and how sure, in one or two sentences.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"rows: got {len(row)} cells, wanted {len(self.header)} as in the header"
                )

    def html(self) -> str:
        """Renders the table inside a box of its own that scrolls sideways on narrow screens."""
        cells = lambda tag, row: "".join(f"<{tag}>{_escape(cell)}</{tag}>" for cell in row)
        caption = f'<p class="caption">{_escape(self.caption)}</p>' if self.caption else ""
        body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in self.rows)
        return (
            f'<div class="wide"><table><thead><tr>{cells("th", self.header)}</tr></thead>\n'
            f"<tbody>{body}</tbody></table></div>{caption}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing as SVG markup, trusted as `jaxtopk.analysis.plots.to_svg` returns it.

    Args:
      caption: what is drawn; also what a screen reader says.
    """

    svg: str
    caption: str

    def html(self) -> str:
        """Renders the drawing inline."""
        start = self.svg.find("<svg")
        if start < 0:
            raise ValueError(f"svg: got {self.svg[:40]!r}, wanted SVG markup")
        caption = _escape(self.caption)
        return (
            f'<figure role="img" aria-label="{caption}">{self.svg[start:]}'
            f"<figcaption>{caption}</figcaption></figure>"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """Texts side by side, each under a label, such as what a model wrote at each setting.

    Args:
      context: what all of them continue.
      texts: pairs of label and text.
    """

    context: str
    texts: Sequence[tuple[str, str]]

    def html(self) -> str:
        """Renders the context once and the texts as a list."""
        rows = "".join(
            f"<dt>{_escape(label)}</dt><dd>{_escape(text)}</dd>\n" for label, text in self.texts
        )
        return f"<blockquote>{_escape(self.context)}</blockquote><dl>{rows}</dl>"


type Block = Text | Table | Figure | Examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Blocks under a heading."""

    heading: str
    blocks: Sequence[Block]


def render(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Returns the whole page; nothing in it is fetched from anywhere.

    Args:
      title: of the page and its first heading.
      lead: one paragraph: what was asked and what came out.
      sections: in reading order.
    """
    parts = [
        f"<section><h2>{_escape(section.heading)}</h2>\n"
        + "\n".join(block.html() for block in section.blocks)
        + "</section>"
        for section in sections
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        f'<h1>{_escape(title)}</h1>\n<p class="lead">{_escape(lead)}</p>\n'
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d9dde3; --page: #fbfbfa; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a0a8b3; --line: #363c45; --page: #16191d; --card: #1d2126; }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p { max-width: 46rem; }
.lead { font-size: 1.05rem; color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
.caption { color: var(--soft); font-size: .85rem; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:last-child, th:last-child { padding-right: 0; }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; background: #fff; border-radius: 6px; border: 1px solid var(--line); }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .4rem; max-width: 46rem; }
blockquote { margin: 0 0 1rem; padding: .6rem 1rem; border-left: 3px solid var(--line); white-space: pre-wrap;
  color: var(--soft); background: var(--card); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .5rem 1.25rem; margin: 0; }
dt { font-weight: 600; font-variant-numeric: tabular-nums; }
dd { margin: 0; white-space: pre-wrap; }
"""
