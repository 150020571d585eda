"""A method of your own with a row in the comparison: the first encoder learns at half speed.

python examples/own_method.py --dataset digits --seeds 0
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from baselines import METHODS, RULES, Joint
from common.command_line import run_command
from experiments import compare


class HalfSpeed(Joint):
    """Joint training with the gradients of the first modality's encoder halved."""

    def change_gradients(self, model, features, labels):
        first = next(iter(model.encoders.values()))
        for p in first.parameters():
            p.grad.mul_(0.5)


RULES["half-speed"] = HalfSpeed  # two lines in baselines.py make it one of the rules for good
METHODS["half-speed"] = ()  # the flags that decide its result

if __name__ == "__main__":
    run_command(compare.main)
