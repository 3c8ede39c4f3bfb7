"""A module's forward as a graph of ATen operations, by torch.export.

The batch is a size that nothing else has, ``INPUT``: wherever a multiple of it is in a shape, images are meant. The
tensors of the export are fake, so it costs nothing.
"""

import contextlib
import copy
import inspect
import io
import logging
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stages.core.runtime.errors import InputError

INPUT = 10007  # a prime
WRAPPERS = ("DataParallel", "DistributedDataParallel", "OptimizedModule", "AveragedModel")
VIEW_CALLS = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "unsqueeze", "squeeze",
    "select", "slice", "expand", "split", "split_with_sizes", "chunk", "unbind", "alias", "detach", "contiguous",
    "dropout", "feature_dropout", "to", "movedim", "narrow", "diagonal", "unfold", "swapaxes", "squeeze_",
}  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """graph: ATen calls in order. tensors: placeholder or attribute -> name in the state dict, or a constant."""

    graph: torch.fx.Graph
    tensors: dict[str, str | Tensor]


@torch.library.custom_op("networks::local_response_norm", mutates_args=())
def _local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """Stays one call: as torch writes it, it is a pooling over channels."""
    return F.local_response_norm(x, size, alpha, beta, k)


@_local_response_norm.register_fake
def _(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    return torch.empty_like(x)


def unwrap(module: nn.Module) -> nn.Module:
    """What a wrapper of torch holds."""
    while type(module).__name__ in WRAPPERS:
        log.info("%s: read as the module it wraps", type(module).__name__)
        module = module._orig_mod if hasattr(module, "_orig_mod") else module.module
    return module


def fresh(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without what it remembers of its last run (tables made from its weights)."""
    held = [
        own for part in module.modules() for own in tree_leaves(dict(vars(part))) if isinstance(own, Tensor)
    ]
    known = {id(own): own.detach().clone() for own in held if not own.is_leaf}
    return copy.deepcopy(module, known).train().eval()


def export(module: nn.Module, example: Tensor) -> Exported:
    """Export a module, which is left as it is.

    example: (n, ...), of which shape and type count. Raises InputError in one line where torch cannot.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(f"{type(module).__name__}: a scripted module; allowed: the module it was made from")
    required = [
        name
        for name, argument in inspect.signature(module.forward).parameters.items()
        if argument.default is argument.empty and argument.kind is argument.POSITIONAL_OR_KEYWORD
    ]
    if len(required) > 1:
        raise InputError(f"{required[1]}: a second input; allowed: networks of one input")
    kept = fresh(module)
    for part in kept.modules():
        if isinstance(part, nn.SyncBatchNorm):
            part.forward = nn.BatchNorm2d._check_input_dim and _batch_norm_forward(part)
    mode = torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        images = torch.empty(INPUT, *example.shape[1:], dtype=_dtype(kept, example))
    with torch.no_grad(), _quiet():
        try:
            program = torch.export.export(kept.cpu(), (images,), strict=False)
            if not _functional(program.graph_module.graph):
                program = program.run_decompositions({})
        except (
            Exception
        ) as error:  # whatever torch or a forward raises is about the user's module: said in one line
            said = _first_line(error).replace(str(INPUT), "n")  # the number that stands for the batch
            raise InputError(
                f"{type(module).__name__}: torch.export cannot read it ({said}); "
                "allowed: a forward of one tensor without branches on its values"
            ) from error
    signature = program.graph_signature
    tensors: dict[str, str | Tensor] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    state = kept.state_dict()
    for name, path in list(tensors.items()):
        if path not in state:  # a buffer that is not saved
            tensors[name] = kept.get_buffer(path)
    for name, path in signature.inputs_to_lifted_tensor_constants.items():
        tensors[name] = program.constants[path]
    if len(signature.user_inputs) != 1:
        others = [n for n in signature.user_inputs if isinstance(n, str)][1:]
        if others:
            raise InputError(f"{others[0]}: a second input; allowed: networks of one input")
    return Exported(program.graph_module.graph, tensors)


def _batch_norm_forward(part: nn.SyncBatchNorm):
    def forward(x: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            x,
            part.running_mean,
            part.running_var,
            part.weight,
            part.bias,
            part.running_mean is None,
            0.0,
            part.eps,
        )

    return forward


def _dtype(module: nn.Module, example: Tensor) -> torch.dtype:
    if not example.is_floating_point():
        return example.dtype
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), example.dtype)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Attention runs as its parts, and torch keeps its notes to itself."""
    import warnings

    before, plain = torch.backends.mha.get_fastpath_enabled(), F.local_response_norm
    autocast = (
        torch.autocast.__enter__,
        torch.autocast.__exit__,
    )  # a region of its own, which would be another graph
    torch.autocast.__enter__, torch.autocast.__exit__ = (lambda own: own), (lambda *_: None)
    torch.backends.mha.set_fastpath_enabled(False)
    F.local_response_norm = torch.ops.networks.local_response_norm
    notes = [logging.getLogger(f"torch.{name}") for name in ("_subclasses.fake_tensor", "export", "fx")]
    levels = [own.level for own in notes]
    for own in notes:
        own.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        F.local_response_norm = plain
        torch.autocast.__enter__, torch.autocast.__exit__ = autocast
        for own, level in zip(notes, levels, strict=True):
            own.setLevel(level)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def opname(node: torch.fx.Node) -> str:
    """The ATen name of a call, without its overload."""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    return (
        schema.name.partition("::")[2]
        if schema is not None
        else getattr(node.target, "__name__", str(node.target))
    )


def _functional(graph: torch.fx.Graph) -> bool:
    """Make operations in place functional; False where one works on what another name sees too."""
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        if node.op != "call_function" or not hasattr(node.target, "_schema"):
            if node.op in ("call_module", "call_method") or "set_grad" in str(node.target):
                return False
            continue
        if not node.target._schema.is_mutable:
            continue
        name, changed = opname(node), node.args[0]
        plain = getattr(torch.ops.aten, name.removesuffix("_"), None)
        aliased = (
            changed.op != "call_function" or opname(changed) in VIEW_CALLS or opname(changed) == "getitem"
        )
        aliased |= any(opname(user) in VIEW_CALLS and order[user] < order[node] for user in changed.users)
        if (
            not name.endswith("_")
            or plain is None
            or aliased
            or node.target._overloadname not in plain.overloads()
        ):
            return False
        node.target = getattr(plain, node.target._overloadname)
        later = {user for user in changed.users if order[user] > order[node]}
        changed.replace_all_uses_with(node, delete_user_cb=lambda user, later=later: user in later)
    return True
