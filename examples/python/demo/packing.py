"""Windows of a token stream, in an order that depends on nothing but a seed and the step."""

import numpy as np
import torch


class Windows:
    """Batches `[batch, context + 1]` int64 of one stream: inputs are `[:, :-1]`, targets `[:, 1:]`.

    Every epoch cuts the stream into windows from another offset and shuffles them. `batch(step)` is a pure function:
    the step is all that a resumed run needs to know of its position in the data.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch_size: int, seed: int) -> None:
        self.tokens = torch.from_numpy(tokens)
        self.context, self.batch_size, self.seed = context, batch_size, seed
        self.per_epoch = (len(tokens) - context) // context
        if self.per_epoch < 1:
            raise ValueError(f"tokens: got {len(tokens)}, want at least {2 * context} for context {context}")
        self._epoch, self._starts = None, None

    def batch(self, step: int) -> torch.Tensor:
        first = step * self.batch_size
        starts = [self._start(first + row) for row in range(self.batch_size)]
        return torch.stack([self.tokens[start : start + self.context + 1] for start in starts]).long()

    def _start(self, sample: int) -> int:
        epoch, index = divmod(sample, self.per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch])
            self._starts = order.permutation(self.per_epoch) * self.context + order.integers(self.context)
            self._epoch = epoch
        return int(self._starts[index])


def evaluation_windows(tokens: np.ndarray, context: int, limit: int) -> torch.Tensor:
    """At most `limit` windows `[windows, context + 1]` int64, in order and spread evenly over the stream."""
    count = (len(tokens) - 1) // context
    if count < 1:
        raise ValueError(f"tokens: got {len(tokens)}, want more than {context}")
    chosen = np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))
    stream = torch.from_numpy(tokens)
    return torch.stack([stream[i * context : i * context + context + 1] for i in chosen]).long()
