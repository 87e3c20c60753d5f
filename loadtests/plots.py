"""The plots of the report: the runs of a scenario as SVG, in the colours and the font of the page around them."""

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, Final

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.goals import number_words
from loadtests.measured import Latencies, Run
from loadtests.overload import TWICE

_TITLES: Final = {
    "gavel": "Gavel",
    "row_lock": "FastAPI, row locks",
    "ray_calls": "Ray calls",
    "ws": "Node's ws",
    "socketio": "Socket.IO",
}
_OWN: Final = "#0072B2"
"""Our colour. A page may give it another shade, as its variable `--own`."""
# Okabe and Ito's colours, which the colour-blind can tell apart too, on light and on dark; and dashes besides.
_LINES: Final[dict[str, dict[str, Any]]] = {
    "gavel": {"color": _OWN, "linestyle": "-"},
    "row_lock": {"color": "#D55E00", "linestyle": "--"},
    "ray_calls": {"color": "#009E73", "linestyle": "-."},
    "ws": {"color": "#E69F00", "linestyle": ":"},
    "socketio": {"color": "#CC79A7", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
}
_INK: Final = "#010203"
"""A colour that nothing else has, and that becomes the page's."""
_SETTINGS: Final[Any] = {
    "svg.fonttype": "none",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}
_SIZE_INCHES: Final = (4.6, 3.1)
_PERCENTS: Final = (50, 90, 99, 99.9, 99.99, 99.999)
_POINTS_PER_DECADE: Final = 20
_COSTS: Final = {
    "bytes_per_socket": ("Memory of an idle socket", "KiB", 1024),
    "idle_cpu_percent": ("Processor for all idle sockets", "% of a core", 1),
}
_NUMBERS: Final = itertools.count()


def plots_of(scenario: str, runs: Sequence[Run]) -> list[Markup]:
    """All plots of a scenario: latencies, what changed over time, what a socket costs."""
    if scenario == "overload":
        rated = [run for run in runs if "bids_per_second" in run.figures]
        by_rate = [
            _plot(title, partial(_draw_by_rate, runs=rated, figure=figure)) for figure, title in _BY_RATE.items()
        ]
        runs = [run for run in runs if run.load == TWICE]
        return by_rate + _over_loads(runs) if runs else []
    costs = [(figure, [run for run in runs if figure in run.figures]) for figure in _COSTS]
    return _over_loads(runs) + [
        _plot(_COSTS[figure][0], partial(_draw_cost, runs=having, figure=figure)) for figure, having in costs if having
    ]


def subjects_of(runs: Sequence[Run]) -> list[str]:
    """Who was measured, ourselves first."""
    order = list(_TITLES)
    return sorted({run.subject for run in runs}, key=order.index)


def title_of(subject: str) -> str:
    """What a subject is called in the report."""
    return _TITLES[subject]


def heading_of(figure: str) -> str:
    """A figure's name as the heading of a column or an axis, without its unit."""
    for unit in ("_ms", "_s", "_percent"):
        figure = figure.removesuffix(unit)
    return figure.replace("_us_per_", " per ").replace("_", " ").replace("per second", "a second")


_BY_RATE: Final = {"acks_per_second": "Acknowledged at each rate", "ack_p99_ms": "ack p99 at each rate"}


def _over_loads(runs: Sequence[Run]) -> list[Markup]:
    """For each load: its latencies, and what changed over time."""
    drawings: list[tuple[str, Callable[[Axes], None]]] = []
    for load in dict.fromkeys(run.load for run in runs):
        same = [run for run in runs if run.load == load]
        for name in dict.fromkeys(name for run in same for name in run.latencies):
            having = [run for run in same if name in run.latencies]
            drawings.append((f"{heading_of(name)}: {load}", partial(_draw_latencies, runs=having, name=name)))
        for name in dict.fromkeys(name for run in same for name in run.series):
            # A line has two ends at least.
            if having := [run for run in same if len(run.series.get(name, ())) > 1]:
                drawings += [(f"{heading_of(name)}: {load}", partial(_draw_series, runs=having, name=name))]
    return [_plot(title, draw) for title, draw in drawings]


def _draw_latencies(axes: Axes, runs: Sequence[Run], name: str) -> None:
    """The latency within which so many percent came, all repetitions taken together; each decade is one more nine."""
    longest = 0.0
    for subject in subjects_of(runs):
        latencies = Latencies()
        for run in runs:
            if run.subject == subject:
                latencies.merge(run.latencies[name])
        if not latencies.count:
            continue
        decades = math.log10(latencies.count)
        longest = max(longest, decades)
        steps = [step / _POINTS_PER_DECADE for step in range(int(decades * _POINTS_PER_DECADE) + 1)]
        values = [latencies.percentile_ms(100 * (1 - 10**-step)) for step in steps]
        axes.plot(steps, values, label=title_of(subject), **_LINES[subject])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter("")
    shown = [percent for percent in _PERCENTS if -math.log10(1 - percent / 100) <= longest + 0.01]
    axes.set_xticks([-math.log10(1 - percent / 100) for percent in shown], [f"{percent:g} %" for percent in shown])
    axes.set_xlabel("of all were within")
    axes.set_ylabel("ms")


def _draw_series(axes: Axes, runs: Sequence[Run], name: str) -> None:
    """What changed over time, a line for each repetition."""
    labelled: set[str] = set()
    for run in runs:
        label = None if run.subject in labelled else title_of(run.subject)
        labelled.add(run.subject)
        axes.plot(*zip(*run.series[name], strict=True), label=label, alpha=0.8, **_LINES[run.subject])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel("seconds")
    axes.set_ylabel("ms" if name.endswith("_ms") else heading_of(name))


def _draw_cost(axes: Axes, runs: Sequence[Run], figure: str) -> None:
    """A bar for each subject: the median of its runs."""
    _, unit, scale = _COSTS[figure]
    subjects = subjects_of(runs)
    for place, subject in enumerate(subjects):
        value = median(run.figures[figure] for run in runs if run.subject == subject) / scale
        bar = axes.barh(place, value, color=_LINES[subject]["color"], height=0.5)
        axes.bar_label(bar, [number_words(round(value, 2))], padding=3)
    axes.set_yticks(range(len(subjects)), [title_of(subject) for subject in subjects])
    axes.set_ylim(-0.6, len(subjects) - 0.4)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(unit)


def _draw_by_rate(axes: Axes, runs: Sequence[Run], figure: str) -> None:
    """A point for each rate that was tried."""
    for subject in subjects_of(runs):
        rates = [run.figures["bids_per_second"] for run in runs if run.subject == subject]
        values = [run.figures[figure] for run in runs if run.subject == subject]
        axes.plot(rates, values, linestyle="none", marker="o", color=_LINES[subject]["color"])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel("bids sent a second")
    if figure.endswith("_ms"):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_ylabel("ms")
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.set_ylabel(heading_of(figure))


def _plot(title: str, draw: Callable[[Axes], None]) -> Markup:
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend()
        text = io.StringIO()
        # Without metadata, which would hold the addresses of the vocabularies in which it is written.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return Markup(_inline(text.getvalue()))  # noqa: S704 (of our own making)


def _inline(svg: str) -> str:
    """A file of matplotlib's as an element of a page."""
    svg = svg[svg.index("<svg") :]
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    # Two plots have parts of the same name.
    own = f"plot{next(_NUMBERS)}-"
    rest = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{own}", rest)
    rest = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", rest)
    rest = rest.replace(_INK, "currentColor").replace(_OWN.lower(), f"var(--own, {_OWN})")
    return f'{head} role="img">{rest}'
