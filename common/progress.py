"""Progress of a run on the terminal."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Progress over the steps of a run, on stderr: a tqdm bar, or in a file or pipe a line every
    ten seconds.

    After the first steps of a run that will take over a minute, one line says for how long.
    """

    FIRST_STEPS, SECONDS = 30, 10
    last_line = time.perf_counter()  # of all runs of a process

    def __init__(self, label, epochs, steps_per_epoch, first_epoch=0):
        self.label, self.epochs, self.steps_per_epoch = label, epochs, steps_per_epoch
        total, self.done = epochs * steps_per_epoch, first_epoch * steps_per_epoch
        self.bar = tqdm(
            desc=label, total=total, initial=self.done, disable=not sys.stderr.isatty(), leave=False
        )
        self.steps_left = total - self.done
        self.steps, self.start = 0, time.perf_counter()

    def __call__(self, batches):
        """Pass `batches` on, counting them."""
        for batch in batches:
            yield batch
            self.bar.update()
            self.steps += 1
            now = time.perf_counter()
            if self.steps == self.FIRST_STEPS:
                minutes = (now - self.start) / self.steps * self.steps_left / 60
                if minutes > 1:
                    self.bar.write(f"{self.label}: about {minutes:.0f} min", file=sys.stderr)
            if self.bar.disable and now - Progress.last_line > self.SECONDS:
                Progress.last_line = now
                epoch, step = divmod(self.done + self.steps - 1, self.steps_per_epoch)
                place = f"epoch {epoch + 1} of {self.epochs}"
                print(f"{self.label}: {place}, step {step + 1}", file=sys.stderr, flush=True)

    def close(self):
        self.bar.close()
