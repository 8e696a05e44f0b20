"""What several commands share."""

import json
import re
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dera_peft.decoding.lambdas import Lambda, NamedLambda

MIN_COLUMN = 38  # characters; λ stand side by side where each gets at least so many


def format_lam(lam: Lambda | None) -> str:
    if lam is None:
        return "base"
    return f"{lam:g}" if isinstance(lam, NamedLambda) else f"λ={lam:g}"


def printable(text: str) -> Text:
    """As it is, without markup; control characters, which a terminal would obey, become a replacement character."""
    return Text(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text))


def print_json(text: str) -> None:
    """JSON, with escapes for what the encoding of standard output does not have; at once."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = "".join(each if each.isascii() else json.dumps(each)[1:-1] for each in text)
    print(text, flush=True)


def side_by_side(console: Console, title: str, texts: dict[Lambda | None, list[str]]) -> None:
    """One prompt's completions by λ: in columns where they are wide enough, else one below the other."""
    console.print(printable(title), style="bold")
    samples = max(map(len, texts.values()))
    if (console.width - 2) // len(texts) >= MIN_COLUMN:
        table = Table(box=None, padding=(0, 1, 1 if samples > 1 else 0, 1), expand=True, header_style="bold cyan")
        for lam in texts:
            table.add_column(format_lam(lam), ratio=1, overflow="fold")
        for sample in range(samples):
            table.add_row(
                *(printable(column[sample].strip() if sample < len(column) else "") for column in texts.values())
            )
    else:
        table = Table(box=None, padding=(0, 1), show_header=False, expand=True)
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column(ratio=1, overflow="fold")
        for lam, column in texts.items():
            for sample, text in enumerate(column):
                table.add_row(format_lam(lam) if sample == 0 else "", printable(text.strip()))
    console.print(table)
    console.print()
