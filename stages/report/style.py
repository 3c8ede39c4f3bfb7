"""What all pictures have in common: style, colours, and bytes that depend on nothing but what is drawn."""

import io
from collections.abc import Sequence

from matplotlib.figure import Figure

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
GREY = "#666666"
_COLOURS = {
    "average": "#8c8c8c",
    "git_rebasin": "#E69F00",
    "activation_matching": "#56B4E9",
    "pleas": "#009E73",
    "pleas_adam": "#0072B2",
    "progressive": "#D55E00",
    "identity": "#8c8c8c",
    "weights": "#E69F00",
    "activations": "#0072B2",
}
_SPARE = ("#CC79A7", "#332288", "#882255", "#999933", "#44AA99", "#AA4499", "#661100", "#117733")


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each method or matching: its own if it has one, else the next spare one."""
    unknown = [name for name in names if name not in _COLOURS]
    spare = {name: _SPARE[index % len(_SPARE)] for index, name in enumerate(unknown)}
    return {name: _COLOURS.get(name) or spare[name] for name in names}


def png(figure: Figure) -> bytes:
    """The picture as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()
