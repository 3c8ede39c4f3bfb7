"""What a fit holds at a layer, beside the values that the sweep keeps: known before anything runs.

A batch's inputs and targets are assembled in the merged network's entries, made into rows some images at a time, and
summed; then the sums are solved.
"""

from typing import TYPE_CHECKING

from stages.core.graph.nodes import Node
from stages.core.merged.blocks import BlockMap
from stages.core.merged.network import MergedNetwork
from stages.core.sweep.gram import gram_bytes
from stages.fit.equations.normal import NormalEquations
from stages.fit.equations.rows import RowEquations
from stages.fit.solvers.grouped import PartEquations

if TYPE_CHECKING:
    from stages.fit.solvers.regmean import RegMean
    from stages.fit.visitor import Fitter

ROW_ENTRIES = 2**24  # entries of one im2col matrix, unless a single image has more


def visit_bytes(fitter: "Fitter", node: Node, images: int, batch: int) -> int:
    """Memory of fitting one layer, by the fitter's solver. batch: the most images that are worked with at a time."""
    if fitter.fit.solver == "adam":
        return _adam_bytes(fitter, node, images, batch)
    adding = rows_bytes(fitter, node, batch)
    if node.grouped:
        return _parts_bytes(fitter.network, node) + adding
    module = fitter.network.map_of(node)
    sizes, blocks, count = map_sizes(module), _block_sizes(module), few_rows(fitter.network, node, images)
    if count is not None:
        held = RowEquations.bytes(count, *sizes, module.weights[0].element_size())
        return held + max(adding, *(RowEquations.solve_bytes(count, *block) for block in blocks))
    equations = len(fitter.sources) if fitter.own_rows(node) else 1
    sums = equations * NormalEquations.bytes(*sizes)
    adding += NormalEquations.add_bytes(*sizes)
    return sums + max(adding, *(NormalEquations.solve_bytes(sizes[0], *block) for block in blocks))


def regmean_bytes(fitter: "RegMean", node: Node, batch: int) -> int:
    """Memory of a layer's regression mean: every task's Gram matrix, then those restricted to a block's inputs."""
    module, networks = fitter.network.map_of(node), len(fitter.sources)
    d_in, _ = map_sizes(module)
    solving = [
        8 * columns * ((networks + 2) * columns + (2 * networks + 3) * rows)
        for columns, rows in _block_sizes(module)
    ]
    return 8 * networks * d_in**2 + max(rows_bytes(fitter, node, batch) + gram_bytes(d_in), *solving)


def rows_bytes(fitter: "Fitter", node: Node, batch: int) -> int:
    """What the inputs and targets of a batch take, assembled and then row by row."""
    network, trace = fitter.network, fitter.network.trace
    module = network.map_of(node)
    own_z, own_y = (trace.shapes[name].numel() for name in (node.inputs[0], node.name))
    z, y = (network.entries(name) for name in (node.inputs[0], node.name))
    kept = 0 if fitter.fit.inputs == "merged" else z
    seen = 2 + (len(fitter.sources) if node.name in fitter.folded else 0)
    assembling = kept + max(2 * own_z if kept else 0, y + seen * own_y)
    taps = module.weights[0].shape[2:].numel()
    copies = 1 if node.operation == "linear" else 2  # what is seen row by row, and that shifted
    by_row = copies * (_row_entries(network, node) + y) + (z if taps > 1 else 0)
    at_a_time = min(batch, images_by_row(network, node))
    entries = max(batch * assembling, batch * (kept + y) + at_a_time * by_row)
    return entries * module.weights[0].element_size()


def few_rows(network: MergedNetwork, node: Node, images: int) -> int | None:
    """How many rows so many images give, when the layer is better solved on them than on sums of their products."""
    d_in, d_out = map_sizes(network.map_of(node))
    count = images * (network.entries(node.name) // d_out)
    return count if 2 * count <= d_in else None


def images_by_row(network: MergedNetwork, node: Node) -> int:
    """How many images are made into rows of inputs at a time."""
    return max(1, ROW_ENTRIES // _row_entries(network, node))


def _row_entries(network: MergedNetwork, node: Node) -> int:
    """Entries of the rows of one image: those of its outputs' places, each with all the inputs it is made from."""
    d_in, d_out = map_sizes(network.map_of(node))
    return network.entries(node.name) // d_out * d_in


def map_sizes(module: BlockMap) -> tuple[int, int]:
    """d_in and d_out of a layer whose blocks are seen as parts of one matrix."""
    return module.inputs.width * module.weights[0].shape[2:].numel(), module.outputs.width


def _block_sizes(module: BlockMap) -> list[tuple[int, int]]:
    """Columns and rows of each block."""
    taps = module.weights[0].shape[2:].numel()
    return [(len(block.columns) * taps, block.stop - block.start) for block in module.blocks]


def _parts_bytes(network: MergedNetwork, node: Node) -> int:
    module = network.map_of(node)
    return PartEquations.bytes(module.groups, module.weight[0].numel(), module.outputs.width // module.groups)


def _adam_bytes(fitter: "Fitter", node: Node, images: int, batch: int) -> int:
    """The inputs and targets of all images; then the steps, each on a few, or the residual in float64."""
    module = fitter.network.map_of(node)
    itemsize = module.weights[0].element_size()
    z, y = (fitter.network.entries(name) for name in (node.inputs[0], node.name))
    held = images * (y + (0 if fitter.fit.inputs == "merged" else z))
    steps = fitter.fit.batch_size * (2 * z + 7 * y)  # of a step forward and back
    steps += 4 * sum(parameter.numel() for parameter in module.parameters())  # with Adam's two moments
    return itemsize * held + max(itemsize * steps, rows_bytes(fitter, node, batch), 40 * batch * y)
