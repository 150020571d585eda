"""Progress of a run on the terminal."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Progress over the steps of a run, on stderr: a tqdm bar, or in a file or pipe a line every
    ten seconds, with the time left.

    After the first steps of a run that will take over a minute, one line says for how long. `pace`
    are the seconds of a step with what belongs to it, such as validation: a mean of all steps, and
    after an epoch one that forgets, as other processes come and go.
    """

    FIRST_STEPS, SECONDS = 30, 10
    last_line = time.perf_counter()  # of all runs of a process

    def __init__(self, label, epochs, steps_per_epoch, first_epoch=0):
        self.label, self.epochs, self.steps_per_epoch = label, epochs, steps_per_epoch
        self.total, self.done = epochs * steps_per_epoch, first_epoch * steps_per_epoch
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(
            desc=label, total=self.total, initial=self.done, disable=hidden, leave=False
        )
        self.steps, self.pace, self.last = 0, 0.0, time.perf_counter()

    def __call__(self, batches):
        """Pass `batches` on, counting them."""
        for batch in batches:
            yield batch
            self.bar.update()
            now = time.perf_counter()
            self.steps += 1
            memory = min(self.steps, max(self.FIRST_STEPS, self.steps_per_epoch))
            self.pace += (now - self.last - self.pace) / memory
            self.last = now
            left = self.time_left()
            if self.steps == self.FIRST_STEPS and left:
                self.bar.write(f"{self.label}: {left}", file=sys.stderr)
            if self.bar.disable and now - Progress.last_line > self.SECONDS:
                Progress.last_line = now
                epoch, step = divmod(self.done + self.steps - 1, self.steps_per_epoch)
                words = [f"epoch {epoch + 1} of {self.epochs}", f"step {step + 1}"]
                words += [left] if left and self.steps > self.FIRST_STEPS else []
                print(f"{self.label}: {', '.join(words)}", file=sys.stderr, flush=True)

    def time_left(self):
        """`about 12 min left`, or nothing for less than one."""
        minutes = self.pace * (self.total - self.done - self.steps) / 60
        return f"about {minutes:.0f} min left" if minutes > 1 else ""

    def close(self):
        self.bar.close()
