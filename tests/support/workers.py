"""Workers of one task as processes of torch.distributed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any


def two_workers(share: Callable[[int, int, str, Any], None], folder: Path) -> list[Any]:
    """Results of two workers, tuples that begin with the worker's number, in its order.

    Args:
        share: Work of a worker: its number, the number of workers, the address of their group, the queue of results.
        folder: Folder for the file by which they meet.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    address = f"file://{folder / 'rendezvous'}"
    workers = [context.Process(target=share, args=(rank, 2, address, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    done = sorted((results.get(timeout=180) for _ in workers), key=lambda item: item[0])
    for worker in workers:
        worker.join(60)
    return done
