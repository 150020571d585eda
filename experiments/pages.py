"""The tables that README.md and docs/ show, made from results/.

    python -m experiments.pages README.md data/README.md docs/*.md

renews every table that stands between `<!-- table FILE PART -->` and `<!-- end -->`. An experiment
writes to runs/; what the pages show is copied from there to results/ by hand: rows.csv and
table.json as NAME.csv and NAME.json (umt_ume's decisions.json as umt_choice_DATASET.json), and
figure.png to docs/NAME.png.
"""

import argparse
import re
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="+", type=Path)
    for page in parser.parse_args().pages:
        page.write_text(renew_tables(page.read_text()))
