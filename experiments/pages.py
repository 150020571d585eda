"""The tables that README.md and docs/ show, made from results/.

    python -m experiments.pages README.md data/README.md docs/*.md

renews every table that stands between `<!-- table FILE PART -->` and `<!-- end -->`.
"""

import re
import sys
from pathlib import Path

from common.storage import read_json
from common.tables import cell

from .grid import RESULTS, describe_difference

MARKERS = re.compile(r"(<!-- table (\S+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def format_markdown(rows):
    """Rows (dicts with equal keys) as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[cell(value) for value in row.values()] for row in rows]
    escaped = [[text.replace("|", r"\|") for text in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def table_part(record, part):
    """Markdown of one part of an experiment's JSON: `paired` as a list, other rows as a table."""
    if part == "paired":
        return "\n".join(f"- {describe_difference(row)}" for row in record["paired"])
    return format_markdown(record[part])


def renew_tables(text):
    """`text` with every table between markers made anew from its JSON in results/."""

    def renew(match):
        table = table_part(read_json(RESULTS / match[2]), match[3])
        return f"{match[1]}{table}\n{match[4]}"

    return MARKERS.sub(renew, text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(renew_tables(Path(name).read_text()))
