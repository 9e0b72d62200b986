"""Figures over the layers of a model: channel or block maxima, and the SQNR of linears."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from jaxtyping import Array, Float
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from duquantpp_jax.analysis.figures import style

MOST_CELLS = 512
"""Most cells in a row of a heat map; print shows no more."""


def amax_map(
    amax: Mapping[str, Float[Array | np.ndarray, "layers _"]],
    *,
    block_size: int = 1,
    title: str = "",
    columns: style.Columns = 2,
) -> Figure:
    """Largest |x| of every channel, or of every block of channels, by layer: a heat map a site.

    All panels have the same log2 colours; zero is grey. More than 512 cells in a row are reduced
    to 512 by the maximum.

    Args:
      amax: Site -> largest magnitude of each channel, e.g. `Stats.absmax`.
      block_size: Channels of a block.

    Raises:
      ValueError: No site, NaN or Inf, or a width that blocks do not divide.
    """
    maps = {}
    for site, maxima in style.given("maxima", amax).items():
        if maxima.shape[1] % block_size:
            raise ValueError(
                f"{site}: a width of {maxima.shape[1]} is not a multiple of block {block_size}: "
                "choose another block"
            )
        maps[site] = maxima.reshape(len(maxima), -1, block_size).max(axis=-1)
    low, high = style.powers_of_two(np.concatenate([values.ravel() for values in maps.values()]))
    figure = style.blank(columns, 0.7 + 0.75 * len(maps))
    panels = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    cells, cmap = cast(Any, None), colormaps["viridis"].with_extremes(bad="#BBBBBB")
    for axes, (site, values) in zip(panels, maps.items(), strict=True):
        layers, width = values.shape
        starts = style.starts(width, MOST_CELLS)
        x, y = np.append(starts, width) - 0.5, np.arange(layers + 1) - 0.5
        z, norm = np.maximum.reduceat(values, starts, axis=1), LogNorm(low, high)
        cells = axes.pcolormesh(x, y, z, norm=norm, cmap=cmap, rasterized=True)
        axes.invert_yaxis()
        axes.set_xticks(range(0, width, 2 ** max(0, int(np.ceil(np.log2(width / 8))))))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        style.label(axes, y="layer", title=site)
    across = "channel" if block_size == 1 else f"block of {block_size} channels"
    panels[-1].set_xlabel(across, fontsize=style.LABEL_SIZE)
    figure.suptitle(title, fontsize=style.LABEL_SIZE)
    bar = style.colorbar(figure, cells, panels, "largest |x|")
    style.log2_ticks(bar.ax.yaxis, low, high)
    return figure


def sqnr(
    methods: Mapping[str, Mapping[str, Float[Array | np.ndarray, "layers linears"]]],
    *,
    title: str = "",
    columns: style.Columns = 2,
) -> Figure:
    """SQNR in dB by layer: a panel a site, a line a method.

    The line is the mean over the linears of the site, the dots are the linears.

    Args:
      methods: Method -> site -> SQNR of each linear, as `evaluation.sqnr.linear_sqnr` gives it.

    Raises:
      ValueError: No method, NaN or Inf, or methods with different sites.
    """
    checked = {name: style.given(f"SQNR ({name})", sites) for name, sites in methods.items()}
    if not checked:
        raise ValueError("no methods to draw: give at least one")
    sites = list(next(iter(checked.values())))
    for name, by_site in checked.items():
        if list(by_site) != sites:
            raise ValueError(
                f"{name} has sites {list(by_site)}: give all methods the sites {sites}"
            )
    across = len(sites) if columns == 2 else min(2, len(sites))
    down = -(-len(sites) // across)
    figure = style.blank(columns, 0.8 + 1.5 * down)
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, site in zip(panels, sites, strict=False):
        for number, (name, by_site, look) in enumerate(style.styled(checked)):
            values = by_site[site]
            layers = np.arange(len(values))
            marker, mean = style.MARKERS[number % len(style.MARKERS)], values.mean(axis=1)
            axes.plot(layers, mean, label=name, marker=marker, markersize=3, linewidth=1, **look)
            beside = layers + 0.12 * (number - (len(checked) - 1) / 2)
            axes.plot(beside, values, ".", color=look["color"], markersize=2, alpha=0.7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.grid(linewidth=0.3)
        style.label(axes, title=site)
    for axes in panels[len(sites) :]:
        axes.set_axis_off()
    for axes in panels[::across]:
        axes.set_ylabel("SQNR, dB", fontsize=style.LABEL_SIZE)
    for axes in panels[max(0, len(sites) - across) : len(sites)]:
        axes.set_xlabel("layer", fontsize=style.LABEL_SIZE)
        axes.tick_params(labelbottom=True)
    style.legend_below(figure, panels[0])
    figure.suptitle(title, fontsize=style.LABEL_SIZE)
    return figure
