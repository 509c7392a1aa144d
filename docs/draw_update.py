"""Draws docs/update.png, what a sequence weighs: ``python docs/draw_update.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from topr_kernels import REINFORCE, TIS, TOPR, Limits
from topr_kernels.taper import taper

FILE = Path(__file__).with_name("update.png")
#: Okabe and Ito's colours, told apart by colour-blind readers.
LINES = (
    (REINFORCE, "naive REINFORCE", "--C1"),
    (TIS, "truncated IS", ":C2"),
    (TOPR, "TOPR", "-C0"),
)
COLOURS = ("#0072B2", "#D55E00", "#009E73")


def weight(limits: Limits, log_ratio: torch.Tensor, positive: bool) -> torch.Tensor:
    """Weight of sequences with these log-ratios and one sign of the reward."""
    low, high = limits.log()[:2] if positive else limits.log()[2:]
    return taper(log_ratio, torch.full_like(log_ratio, low), torch.full_like(log_ratio, high))[1]


def draw(path: Path) -> None:
    """Two panels: right answers and wrong ones, TOPR beside naive REINFORCE."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    mpl.rcParams.update({"font.size": 9, "savefig.dpi": 200})
    mpl.rcParams["axes.prop_cycle"] = mpl.cycler(color=COLOURS)
    figure, axes = pyplot.subplots(1, 2, figsize=(8.3, 2.6), sharey=True, layout="constrained")
    log_ratio = torch.linspace(-6, 3, 400)
    for ax, positive, title in zip(
        axes, (True, False), ("right answers: learn in full", "wrong answers: fade"), strict=True
    ):
        for limits, name, style in LINES:
            ax.plot(log_ratio, weight(limits, log_ratio, positive), style, label=name)
        ax.axvline(0, color="#dddddd", linewidth=0.8, zorder=0)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("log π(y)/μ(y) of the sequence, nats")
        ax.set_ylim(-0.05, 1.2)
    axes[0].set_ylabel("weight of the sequence")
    axes[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, 0.85))
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
