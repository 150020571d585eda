"""Progress of a run on the terminal."""

import sys
import time

from tqdm import tqdm


class Progress:
    """A tqdm bar over the steps of a run, on stderr if that is a terminal.

    After the first steps of a run that will take over a minute, one line says for how long.
    """

    FIRST_STEPS = 30

    def __init__(self, label, epochs, steps_per_epoch, first_epoch=0):
        self.label = label
        total, done = epochs * steps_per_epoch, first_epoch * steps_per_epoch
        self.bar = tqdm(
            desc=label, total=total, initial=done, disable=not sys.stderr.isatty(), leave=False
        )
        self.steps_left = total - done
        self.steps, self.start = 0, time.perf_counter()

    def __call__(self, batches):
        """Pass `batches` on, counting them."""
        for batch in batches:
            yield batch
            self.bar.update()
            self.steps += 1
            if self.steps == self.FIRST_STEPS:
                minutes = (time.perf_counter() - self.start) / self.steps * self.steps_left / 60
                if minutes > 1:
                    self.bar.write(f"{self.label}: about {minutes:.0f} min", file=sys.stderr)

    def close(self):
        self.bar.close()
