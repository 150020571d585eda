"""A method of your own with a row in compare.py: the first modality's encoder learns at half speed.

python examples/own_method.py --dataset digits --seeds 0
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import compare
from common.command_line import run_command
from common.rebalance import RIVALS, Rival


class HalfSpeed(Rival):
    """Joint training with the gradients of the first encoder halved; see `Rival` for the hooks."""

    def modulate(self, model, features, labels):
        first = next(iter(model.encoders.values()))
        for p in first.parameters():
            p.grad.mul_(0.5)


RIVALS["half-speed"] = HalfSpeed  # a line in common/rebalance.py makes it one of all the scripts

if __name__ == "__main__":
    run_command(compare.main)
