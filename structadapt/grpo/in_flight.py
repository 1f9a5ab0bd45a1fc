"""The sequences that are being sampled: some leave, others come."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from structadapt.grpo.network import Network


class InFlight:
    """The sequences in work: `step` brings their next logits, `put` their tokens."""

    def __init__(
        self, model: nn.Module, prompt: Tensor, prompt_mask: Tensor, share: bool, slots: int,
        together: Callable[[bool], bool] | None,
    ) -> None:  # fmt: skip
        self.model, self.prompt, self.prompt_mask = model, prompt, prompt_mask
        self.share, self.slots, self.together = share, slots, together
        self.padded = not bool(prompt_mask.all())
        self.next = 0  # the first prompt that waits
        self.rows = torch.empty(0, dtype=torch.long, device=prompt.device)
        self.network: Network | None = None
        self.token: Tensor | None = None  # drawn and not yet read by the model
        self.mask = self.logits = torch.empty(0)
        self.lengths = self.rows

    def step(self) -> bool:
        """Read the last tokens and, where there is room, new prompts. False: nothing is left."""
        busy = len(self.rows) > 0
        if self._any(busy):
            if busy:
                assert self.network is not None and self.token is not None
                ones = torch.ones_like(self.token)[:, None]
                self.mask = torch.cat([self.mask, ones], 1)
                self.logits = self.network.extend(self.token[:, None], self.mask)[:, -1]
            else:
                self._idle()
        free, waiting = self.slots - len(self.rows), len(self.prompt) - self.next
        able = not busy or (self.network is not None and self.network.joins)
        wanted = waiting > 0 and able and (not busy or free >= max(self.slots // 4, 1))
        if self._any(wanted):
            if wanted:
                self._admit(min(free, waiting))
            else:
                self._idle()
        return self._any(len(self.rows) > 0)

    def put(self, token: Tensor, done: Tensor) -> None:
        """The tokens (n,) of the sequences in work; those that are `done` leave."""
        self.token, self.lengths = token, self.lengths + 1
        if done.any():
            kept = (~done).nonzero()[:, 0]
            self.rows, self.token, self.lengths = (
                t[kept] for t in (self.rows, token, self.lengths)
            )
            if len(kept):
                assert self.network is not None
                mask = self.mask[kept]
                empty = int(mask.any(0).long().argmax()) if self.network.joins else 0
                self.mask = mask[:, empty:]
                self.network.keep(kept, empty)

    def _admit(self, count: int) -> None:
        """Run the next prompts, and have them take part."""
        new = torch.arange(self.next, self.next + count, device=self.prompt.device)
        self.next += count
        mask = self.prompt_mask[new]
        empty = int(mask.any(0).long().argmax())
        ids, mask = self.prompt[new, empty:], mask[:, empty:]
        network = Network(self.model, padded=self.padded)
        logits = network.start(ids, mask, self.share)
        zeros = torch.zeros_like(new)
        if not len(self.rows):
            self.network, self.mask, self.logits = network, mask, logits
            self.rows, self.lengths = new, zeros
            return
        assert self.network is not None
        width = max(self.mask.shape[1], mask.shape[1])
        self.network.join(network, width)
        self.mask = torch.cat([wide(self.mask, width), wide(mask, width)])
        self.logits = torch.cat([self.logits, logits])
        self.rows, self.lengths = torch.cat([self.rows, new]), torch.cat([self.lengths, zeros])

    def _any(self, yes: bool) -> bool:
        return yes if self.together is None else self.together(yes)

    def _idle(self) -> None:
        """Take part in a forward that other processes need."""
        Network(self.model, padded=False).logits(self.prompt[:1, -1:], self.prompt_mask[:1, -1:])


def wide(mask: Tensor, width: int) -> Tensor:
    """Padded on the left to `width` columns."""
    return torch.nn.functional.pad(mask, (width - mask.shape[1], 0))
