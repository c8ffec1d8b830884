"""Dump the graph after every pass, see what one pass changed, and run two stages side by side.

Each stage is a Python file that runs on its own. Run it: ``python examples/read_a_dump.py``
"""

from __future__ import annotations

import difflib
import itertools
import json
import runpy
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import infercomp


class GatedMLP(nn.Module):
    """An RMSNorm and a gated MLP."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def print_change(before: Path, after: Path) -> None:
    """The lines of the graph that a pass took out and put in."""
    lines = difflib.unified_diff(before.read_text().splitlines(), after.read_text().splitlines(), n=0, lineterm="")
    for line in lines:
        if line[:5] in ("-    ", "+    ") and " = torch.ops." in line:
            print(" ", line.replace("torch.ops.", ""))


def run_stage(stage: Path) -> torch.Tensor:
    """The first output of a stage, on the weights and inputs that lie beside it."""
    return runpy.run_path(str(stage))["main"]()[0]


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        infercomp.explain(GatedMLP().eval(), torch.randn(1, 5, 8), options={"dump": folder})
        stages = sorted(Path(folder).glob("[0-9]*.py"))
        for before, after in itertools.pairwise(stages):
            print(f"{after.name} changed")
            print_change(before, after)
        print("first and last stage, run one after the other:")
        difference = (run_stage(stages[0]) - run_stage(stages[-1])).abs().max().item()
        print(f"they differ by at most {difference:.1e}")
        assert difference < 1e-6
        report = json.loads((Path(folder) / "report.json").read_text())
        print({record["name"]: record["matches"] for record in report["passes"] if record["matches"]})


if __name__ == "__main__":
    main()
