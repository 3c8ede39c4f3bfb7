"""A GPU that is not there: tensors that say they are on `cuda` and are computed by the CPU's kernels.

What CUDA refuses is refused: operands on two devices, a generator of another device, NumPy. So a run on it finds every
tensor that was left on the wrong device, and its results can be compared with the CPU's. It knows nothing of CUDA's
kernels, of its memory and of its speed.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda:0")
FACTORIES = {
    getattr(torch, name)
    for name in (
        *(
            "arange",
            "as_tensor",
            "empty",
            "empty_like",
            "eye",
            "full",
            "full_like",
            "linspace",
            "ones",
            "ones_like",
        ),
        *("rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like"),
    )
} | {getattr(Tensor, f"new_{name}") for name in ("empty", "full", "ones", "tensor", "zeros")}
GETTERS = {Tensor.device.__get__: GPU, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}
HOST = {Tensor.numpy, Tensor.__array__}
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}
ANY = {Tensor.__repr__, Tensor.__deepcopy__, Tensor.data.__set__, torch._has_compatible_shallow_copy_type}
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
SPREAD = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu"


class OnGPU(Tensor):
    """A tensor of the CPU in every respect but what it is asked about its device inside ``pretend_gpu``."""

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            with torch._C.DisableTorchFunctionSubclass():
                copied = self.detach().clone().as_subclass(OnGPU)
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]


def on_gpu(leaf) -> bool:
    return isinstance(leaf, OnGPU)


class _Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in GETTERS:
            return GETTERS[function] if on_gpu(args[0]) else function(*args)
        if function == Tensor.grad.__get__:
            found = function(*args)
            return found.as_subclass(OnGPU) if found is not None and on_gpu(args[0]) else found
        if function in HOST and on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if function in MOVES:
            return _move(function, args, kwargs)
        if function is Tensor.copy_:
            with torch._C.DisableTorchFunctionSubclass():
                function(*args, **kwargs)
            return args[0]
        if function is Tensor.__deepcopy__ and on_gpu(args[0]):
            return OnGPU.__deepcopy__(*args)
        _check(function, args, kwargs)
        if function in FACTORIES and kwargs.get("device") is not None:
            wanted = torch.device(kwargs.pop("device")).type
            with torch._C.DisableTorchFunctionSubclass():
                made = function(*args, **kwargs)
            return made.as_subclass(OnGPU if wanted == "cuda" else Tensor)
        return function(*args, **kwargs)


def _move(function, args, kwargs):
    tensor, *rest = args
    if function is Tensor.cpu:
        rest = ["cpu", *rest]
    elif function is Tensor.cuda:
        rest = ["cuda", *rest]
    if rest and isinstance(rest[0], Tensor):
        rest = [GPU if on_gpu(rest[0]) else "cpu", rest[0].dtype]
    copy = kwargs.pop("copy", False)
    device, dtype, _, memory_format = torch._C._nn._parse_to(*rest, **kwargs)
    wanted = on_gpu(tensor) if device is None else device.type == "cuda"
    options = {} if memory_format is None else {"memory_format": memory_format}
    with torch._C.DisableTorchFunctionSubclass():
        moved = tensor.to(dtype=dtype or tensor.dtype, copy=copy or wanted != on_gpu(tensor), **options)
    return tensor if moved is tensor else moved.as_subclass(OnGPU if wanted else Tensor)


def _check(function, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    asked = kwargs.get("device")
    gpu = torch.device(asked).type == "cuda" if asked is not None else any(map(on_gpu, tensors))
    if kwargs.get("generator") is not None and gpu:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if function in ANY or function in FACTORIES:
        return
    if function in INDEXING:
        indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
        if not on_gpu(args[0]) and any(map(on_gpu, indices)):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        tensors = [args[0], *(leaf for leaf in args[2:] if isinstance(leaf, Tensor))]
    if len({on_gpu(tensor) for tensor in tensors if on_gpu(tensor) or tensor.dim() > 0}) > 1:
        raise RuntimeError(f"{SPREAD} ({getattr(function, '__name__', function)})")


_plain_submit = ThreadPoolExecutor.submit


def _submit(pool, function, /, *args, **kwargs):
    """``submit`` into a thread that has the mode too: modes belong to the thread that enters them."""

    def within(*args, **kwargs):
        with _Mode():
            return function(*args, **kwargs)

    return _plain_submit(pool, within, *args, **kwargs)


@contextlib.contextmanager
def pretend_gpu(free=64 * 2**30):
    """A machine with one GPU and so many bytes free on it."""
    answers = {
        "is_available": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": 1,
        "mem_get_info": (free, free),
        "synchronize": None,
    }
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(
        True
    )  # so that `module.to` makes new parameters
    try:
        with contextlib.ExitStack() as stack:
            for name, answer in answers.items():
                stack.enter_context(mock.patch(f"torch.cuda.{name}", return_value=answer))
            stack.enter_context(mock.patch("torch.accelerator.current_accelerator", return_value=None))
            stack.enter_context(mock.patch.object(ThreadPoolExecutor, "submit", _submit))
            stack.enter_context(_Mode())
            yield GPU
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
