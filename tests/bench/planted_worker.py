"""infercomp's own worker with a planted error: every likeliest token is the next but one, as if rows were shifted."""

from __future__ import annotations

import torch

from infercomp.bench.workers import infercomp_worker
from infercomp.served_model import ServedModel


def main() -> None:
    with_pools = ServedModel.with_pools

    def shifted(self: ServedModel, pools: dict[str, torch.Tensor]):  # type: ignore[no-untyped-def]
        step = with_pools(self, pools)
        return lambda inputs: step(inputs).roll(2, -1)

    ServedModel.with_pools = shifted  # type: ignore[method-assign, assignment]
    infercomp_worker.main()


main()
