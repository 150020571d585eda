"""What the five scripts share and none of the four papers claims."""

import os
import sys

from .terminal import say_interrupted

# On Linux torch then takes large tensors from huge pages. Without it, the page faults of a batch of
# floats on the CPU take longer than its arithmetic. torch reads it at its first allocation, which
# importing torchvision makes; what is computed is the same.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

sys.excepthook = say_interrupted  # before torch is imported, which takes seconds
