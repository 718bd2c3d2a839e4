"""Random numbers that follow from where training stands alone: a resumed run draws what an unbroken one does."""

import hashlib

import torch


def generator(seed: int, *place: int | str) -> torch.Generator:
    """A generator for one place of a run, such as ("noise", stage, step)."""
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def batch_rows(rows: int, batch: int, step: int, seed: int, stage: int) -> list[int]:
    """The sequences of one step: every one of `rows` comes once before any comes again, in a new order each time."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, index = divmod(position, rows)
        if epoch not in orders:
            orders[epoch] = torch.randperm(rows, generator=generator(seed, "order", stage, epoch)).tolist()
        chosen.append(orders[epoch][index])
    return chosen
