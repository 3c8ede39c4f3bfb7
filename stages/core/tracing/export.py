"""A module's forward as a graph of ATen operations, by torch.export.

The batch is a size that nothing else has, ``INPUT``: wherever a multiple of it is in a shape, images are meant. The
tensors of the export are fake, so it costs nothing.
"""

import contextlib
import functools
import inspect
import io
import logging
import operator
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import transformer

from stages.core.runtime.errors import InputError
from stages.core.runtime.surroundings import place_of
from stages.core.tracing.copies import copied, said_first
from stages.core.tracing.decomposed import decomposed
from stages.core.tracing.one_by_one import INPUT, OneByOne
from stages.core.tracing.recurrent import written_out

HERE = str(Path(__file__).parent)
TORCH = str(Path(torch.__file__).parent)
VIEW_CALLS = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "unsqueeze", "squeeze",
    "select", "slice", "expand", "split", "split_with_sizes", "chunk", "unbind", "alias", "detach", "contiguous",
    "dropout", "feature_dropout", "to", "movedim", "narrow", "diagonal", "unfold", "swapaxes", "squeeze_",
}  # fmt: skip


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


def _attention(plain: Callable[..., Any]) -> Callable[..., Any]:
    """torch's multi-head attention; that it gives scores too does not change how its output is computed.

    Where they are asked for, torch has images and heads on one dimension.
    """

    @functools.wraps(plain)
    def attention(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(plain).bind(*args, **kwargs).arguments
        found, scores = plain(**{**given, "need_weights": False}), None
        if given.get("need_weights", True):
            scores = plain(*args, **kwargs)[1]  # nothing, where nobody reads them
        return found[0], scores

    return attention


def export(module: nn.Module, example: Tensor, has_rule: Callable[[torch.fx.Node], bool]) -> Exported:
    """Export a module, which is left as it is.

    example: (n, ...), of which shape and type count. has_rule: of a call; others are decomposed as far as torch knows
    how. Raises InputError in one line where torch cannot.
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
    kept = copied(module)
    for part in kept.modules():
        if isinstance(part, nn.SyncBatchNorm):
            part.forward = nn.BatchNorm2d._check_input_dim and _batch_norm_forward(part)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        images = torch.empty(INPUT, *example.shape[1:], dtype=_dtype(kept, example))
    with torch.no_grad(), _quiet():
        try:
            with OneByOne():
                program = torch.export.export(kept.cpu(), (images,), strict=False)
            steps = written_out(program.graph_module.graph, opname)
            if steps or not _functional(program.graph_module.graph):
                program = program.run_decompositions(steps)
            program = decomposed(program, has_rule)
            _leave_buffers(program)
            program.graph_module.graph.eliminate_dead_code()  # what only a shape was asked of
        except InputError as error:
            raise InputError(
                f"{type(module).__name__}: {error}{place_of(error)}; allowed: operations on all images at once"
            ) from error
        except (
            Exception
        ) as error:  # whatever torch or a forward raises is about the user's module: said in one line
            said = said_first(error).replace(str(INPUT), "n")  # the number that stands for the batch
            raise InputError(
                f"{type(module).__name__}: torch.export cannot read it ({said}{place_of(error)}); "
                "allowed: a forward of one tensor without branches on its values"
            ) from error
    _check_output(program)
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


def _check_output(program: torch.export.ExportedProgram) -> None:
    """Several values are counted where the graph is read; one in a list or a dict is no tensor either."""
    spec = program.call_spec.out_spec
    if spec is not None and spec.num_leaves == 1 and not spec.is_leaf():
        kind = getattr(spec.type, "__name__", "container")
        raise InputError(f"the network returns a {kind} of one tensor; allowed: one tensor")


def _leave_buffers(program: torch.export.ExportedProgram) -> None:
    """What a forward writes into its buffers (counters) is not among its results."""
    written = program.graph_signature.buffers_to_mutate.keys()
    end = program.graph_module.graph.output_node()
    end.args = (tuple(own for own in end.args[0] if getattr(own, "name", None) not in written),)


def _dtype(module: nn.Module, example: Tensor) -> torch.dtype:
    if not example.is_floating_point():
        return example.dtype
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), example.dtype)


def _users_frames(_: Any, found: traceback.StackSummary) -> traceback.StackSummary:
    """Of the calls that lead to an operation those in the user's files: torch itself keeps those named forward."""
    start = max(
        (i for i, f in enumerate(found) if (f.filename, f.name) == (__file__, export.__name__)), default=-1
    )
    inside = [f for f in found[start + 1 :] if not f.filename.startswith((TORCH, HERE))]
    return traceback.StackSummary.from_list(inside)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Attention runs as its parts, and torch keeps its notes to itself."""
    import warnings

    before, plain = torch.backends.mha.get_fastpath_enabled(), F.local_response_norm
    attention, causal = F.multi_head_attention_forward, transformer._detect_is_causal_mask
    frames, said = torch.fx.proxy.TracerBase._filter_traceback_frames, io.StringIO()
    torch.fx.proxy.TracerBase._filter_traceback_frames = _users_frames
    autocast = (
        torch.autocast.__enter__,
        torch.autocast.__exit__,
    )  # a region of its own, which would be another graph
    torch.autocast.__enter__, torch.autocast.__exit__ = (lambda own: own), (lambda *_: None)
    torch.backends.mha.set_fastpath_enabled(False)
    F.local_response_norm = torch.ops.networks.local_response_norm
    F.multi_head_attention_forward = _attention(attention)
    # a branch on the mask's values, by which torch only chooses a faster way
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    notes = [logging.getLogger(f"torch.{name}") for name in ("_subclasses.fake_tensor", "export", "fx")]
    levels = [own.level for own in notes]
    for own in notes:
        own.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        F.local_response_norm, F.multi_head_attention_forward = plain, attention
        transformer._detect_is_causal_mask = causal
        torch.autocast.__enter__, torch.autocast.__exit__ = autocast
        torch.fx.proxy.TracerBase._filter_traceback_frames = frames
        for own, level in zip(notes, levels, strict=True):
            own.setLevel(level)


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
