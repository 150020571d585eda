"""Every table and figure of the papers, and the comparison of all methods.

    python -m experiments.pmr table1 --dataset digits --seeds 0 1 2 3 4

calls pmr.py once for each part of a grid and puts the runs together. No script knows of it.
"""

import common  # noqa: F401, first of all: it makes a sentence of Ctrl-C while torch is imported
