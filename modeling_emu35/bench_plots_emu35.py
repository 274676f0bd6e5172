"""Plots of what `emu35 bench` measures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bench_decode_emu35 import DEFAULT_COUPLING
from .bench_dida_emu35 import PARTS_OF_STEP
from .generation_configuration_emu35 import COUPLINGS

_COLORS = {"ar": "0.35", "none": "tab:orange", "maximal": "tab:green", "gumbel": "tab:blue"}
_TITLES = {"tiny": "emu35-tiny", "random": "random weights"}
#: A share of fewer guesses than that is noise.
_LEAST_GUESSES = 30


def plot_decoders(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what `bench_decode` measured.

    Args:
        results (`dict`): its result.
        folder (`Path`): made if there is none.
    Returns:
        `list[Path]`: decode_passes.png (passes an image, and the cost of a pass, by window), decode_acceptance.png
        (accepted guesses by their place in the window; of the tiny checkpoint), decode_seconds.png (seconds an image
        at batch 1 and 8).
    Raises:
        ImportError: without matplotlib.
    """
    measured = {name: results[name] for name in _TITLES if "decoders" in results[name]}
    figures = {"passes": _plot_passes(measured), "seconds": _plot_seconds(measured)}
    if "tiny" in measured:
        figures["acceptance"] = _plot_acceptance(measured["tiny"]["decoders"])
    return _save(figures, folder, "decode")


def plot_dida(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what `bench_dida` measured.

    Args:
        results (`dict`): its result.
        folder (`Path`): made if there is none.
    Returns:
        `list[Path]`: dida_grids.png (seconds of `ar` by those of `dida`, by number of codes), dida_steps.png (what
        the time of a step goes to), dida_seconds.png (seconds an image of the tiny checkpoint at batch 1 and 8).
    Raises:
        ImportError: without matplotlib.
    """
    figures = {"grids": _plot_grids(results["random"]), "steps": _plot_steps(results["random"])}
    if "decoders" in results.get("tiny", {}):
        figures["seconds"] = _plot_seconds({"tiny": results["tiny"]})
    return _save(figures, folder, "dida")


def _save(figures: dict[str, Any], folder: Path, part: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{part}_{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _panels(rows: int, columns: int, size: tuple[float, float], **options):
    # Without pyplot: no window system, and nothing of the caller's is changed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options).flatten()


def _of(rows: Sequence[dict[str, Any]], coupling: str) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("coupling") == coupling]


def _plot_passes(measured: dict[str, Any]):
    """Passes an image of the tiny checkpoint; and at which windows a pass settles more codes than it costs."""
    tiny = measured.get("tiny")
    figure, panels = _panels(1, 2 if tiny else 1, (4.6, 3.6))
    costs = panels[-1]
    if tiny:
        axes, rows = panels[0], tiny["decoders"]
        axes.axhline(rows[0]["passes"], color=_COLORS["ar"], linestyle="--", label="ar")
        for coupling in COUPLINGS:
            color = _COLORS[coupling]
            _plot_windows(axes, _of(rows, coupling), "passes", marker="o", color=color, label=coupling)
            _plot_windows(axes, _of(rows, coupling), "predicted_passes", marker="x", linestyle=":", color=color)
        axes.plot([], [], color="0.5", marker="x", linestyle=":", label="predicted")
        axes.set(ylabel="forward passes an image", ylim=(0, None))
        axes.set_title(f"{_TITLES['tiny']}, {tiny['grid'][0]} x {tiny['grid'][1]} codes", fontsize="medium")
        gumbel = _of(rows, DEFAULT_COUPLING)
        _plot_windows(costs, gumbel, "codes_per_pass", marker="o", color="tab:blue", label="codes a pass, emu35-tiny")
    for number, (name, part) in enumerate(measured.items()):
        style = {"color": ("tab:red", "0.5")[number], "marker": "s"}
        for kind, line in (("seconds_per_pass", "-"), ("network_seconds_per_pass", ":")):
            ar = part["decoders"][0]["batches"][0][kind]
            relative = [
                {**row, "cost": row["batches"][0][kind] / ar} for row in _of(part["decoders"], DEFAULT_COUPLING)
            ]
            what = "seconds of a pass" if kind == "seconds_per_pass" else "of its network"
            _plot_windows(costs, relative, "cost", linestyle=line, label=f"{what}, {_TITLES[name]}", **style)
    costs.set(ylabel="relative to a pass of ar")
    costs.set_yscale("log", base=2)
    costs.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    costs.set_title(f"what a pass gives and costs (batch 1, {DEFAULT_COUPLING})", fontsize="medium")
    for axes in panels:
        axes.set(xlabel="window (guesses a pass)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return figure


def _plot_windows(axes, rows: Sequence[dict[str, Any]], what: str, **style):
    windows = [row["speculative_window"] for row in rows]
    axes.plot(windows, [row[what] for row in rows], **style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _plot_acceptance(rows: Sequence[dict[str, Any]]):
    figure, panels = _panels(1, len(COUPLINGS), (3.6, 3.4), sharey=True)
    for axes, coupling in zip(panels, COUPLINGS, strict=True):
        for number, row in enumerate(_of(rows, coupling)):
            guesses = row["guesses_by_position"]
            shares = [
                share
                for share, total in zip(row["acceptance_by_position"], guesses, strict=True)
                if total >= min(_LEAST_GUESSES, guesses[0])
            ]
            style = {"marker": ".", "color": f"C{number}", "label": f"window {row['speculative_window']}"}
            axes.plot(range(1, len(shares) + 1), shares, **style)
        axes.set(xlabel="position in the window", ylim=(0, 1))
        axes.set_title(f"coupling {coupling}", fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("this guess and all before it accepted")
    panels[-1].legend(fontsize="small")
    return figure


def _plot_seconds(measured: dict[str, Any]):
    panels = [(name, batch) for name in measured for batch in (1, 8)]
    most = max(len(part["decoders"]) for part in measured.values())
    figure, axes_of = _panels(len(measured), 2, (4.6, 0.9 + 0.22 * most))
    for axes, (name, batch) in zip(axes_of, panels, strict=True):
        runs = [
            (row, own) for row in measured[name]["decoders"] for own in row["batches"] if own["batch_size"] == batch
        ]
        seconds = [own["seconds_per_image"] for _, own in runs]
        colors = [_COLORS.get(row.get("coupling", row["image_decoder"]), "tab:purple") for row, _ in runs]
        bars = axes.barh(range(len(runs)), seconds, color=colors)
        axes.bar_label(bars, [f"{own['speedup']:.2f}x" for _, own in runs], padding=3, fontsize="small")
        axes.set_yticks(range(len(runs)), [row["name"] for row, _ in runs], fontsize="small")
        axes.invert_yaxis()
        axes.set(xlabel="seconds an image", xlim=(0, 1.2 * max(seconds)))
        axes.set_title(f"{_TITLES[name]}, batch {batch}", fontsize="medium")
        axes.grid(alpha=0.3, axis="x")
    return figure


def _plot_grids(random: Sequence[dict[str, Any]]):
    figure, panels = _panels(1, len(random), (4.6, 3.6), sharey=True)
    for axes, measured in zip(panels, random, strict=True):
        rows = measured["grids"]
        codes = [row["grid"][0] * row["grid"][1] for row in rows]
        for index, own in enumerate(rows[0]["dida"]):
            color, name = f"C{index}", f"{own['steps']} steps"
            series = {"ratio": ("-", name, "o"), "limit_ratio": (":", f"{name}, both at their limits", None)}
            for kind, (line, label, marker) in series.items():
                values = [row["dida"][index][kind] for row in rows]
                if None not in values:
                    axes.plot(codes, values, color=color, linestyle=line, marker=marker, label=label)
        axes.axhline(1, color=_COLORS["ar"], linewidth=1, label="ar")
        axes.set_xscale("log", base=4)
        axes.set_yscale("log", base=2)
        axes.set_xticks(codes, [" x ".join(map(str, row["grid"])) for row in rows])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(xlabel="codes of the image")
        axes.set_title(f"{_sizes(measured)}, batch 1", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    panels[0].set_ylabel("seconds of ar by those of dida")
    return figure


def _plot_steps(random: Sequence[dict[str, Any]]):
    figure, panels = _panels(1, len(random), (4.6, 3.2), sharey=True)
    for axes, measured in zip(panels, random, strict=True):
        rows, below = measured["grids"], [0.0] * len(measured["grids"])
        for number, part in enumerate(PARTS_OF_STEP):
            shares = [100 * row["step"][part] / row["step"]["seconds"] for row in rows]
            axes.bar(range(len(rows)), shares, bottom=below, color=f"C{number}", label=part.replace("_", " "))
            below = [lower + share for lower, share in zip(below, shares, strict=True)]
        axes.set_xticks(range(len(rows)), [" x ".join(map(str, row["grid"])) for row in rows])
        axes.set(xlabel="codes of the image")
        axes.set_title(_sizes(measured), fontsize="medium")
        axes.legend(fontsize="x-small", loc="lower right")
    panels[0].set_ylabel("share of a step (%)")
    return figure


def _sizes(measured: dict[str, Any]) -> str:
    return f"{measured['parameters_of_layers'] / 1e6:,.0f} M in layers, {measured['num_codes']:,} codes"
