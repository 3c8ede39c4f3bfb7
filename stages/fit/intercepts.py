"""Where the intercept of a fitted layer goes: its bias, or the batch norm behind where that is folded in."""

from torch import Tensor

from stages.core.graph.nodes import Node
from stages.core.sweep.norms import install_statistics, merged_moments
from stages.core.sweep.sweep import Sweep
from stages.fit.layer import Layer
from stages.fit.problem import LayerSolution
from stages.fit.setup import Setup


class Intercepts:
    """Those of all layers of a merge; they are installed as the sweep comes to them."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._offsets: dict[str, Tensor] = {}  # folded batch norm -> target minus normalised output

    def install(self, layer: Layer, found: LayerSolution) -> None:
        """Put a layer's where the architecture has a place for it."""
        if found.bias is None:
            return
        module, fitted = layer.module, layer.fitted
        if layer.folded:
            if module.bias is not None:  # one place for the offset is enough
                module.bias[fitted] = 0.0
            self._offsets[layer.norm.name] = found.bias
            self._fold(layer.norm, fitted, found.moments)
        elif module.bias is not None:
            module.bias[fitted] = found.bias[fitted].to(module.bias.dtype)

    def set_statistics(self, norm: Node, sweep: Sweep) -> None:
        """The exact mean and variance of the merged network's own values, every task weighing the same."""
        moments = merged_moments(norm, sweep)
        fitted = ~self.setup.exact[norm.name].to(moments.device)
        if norm.name in self._offsets:
            self._fold(norm, fitted, moments)
        else:
            install_statistics(self.setup.network.map_of(norm), moments, fitted)

    def _fold(self, norm: Node, fitted: Tensor, moments: Tensor) -> None:
        """Make the batch norm the shift that the fit asks for, with the statistics of its own input.

        The layer was fitted to what the sources' batch norms give; statistics that are recomputed later on the
        same images leave the function alone.
        """
        bn = self.setup.network.map_of(norm)
        install_statistics(bn, moments, fitted)
        variance = moments[1].to(bn.running_mean.dtype)
        bn.weight[fitted] = (variance + bn.eps).sqrt()[fitted]
        bn.bias[fitted] = (self._offsets[norm.name] + moments[0]).to(bn.bias.dtype)[fitted]
