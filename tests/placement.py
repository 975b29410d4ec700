"""A stand-in for a GPU: real numbers in memory that belongs to another device than the CPU.

PyTorch's `meta` device lends its name. A tensor there is a `Placed` one, and every operation runs on the CPU
after a check of PyTorch's rules for two devices; kernels, precision and speed of a GPU are not modelled."""
import sys
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from latentrefine import core

DEVICE = torch.device("meta:1")      # `transformers` uses `meta` itself
aten, PLAIN = torch.ops.aten, torch.Generator
CROSSING = {aten._to_copy.default, aten.copy_.default, aten.copy.default}       # these may read both devices
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Generator(PLAIN):
    "In place of `torch.Generator`; on the stand-in its numbers are those of the CPU's."
    def __new__(cls, device="cpu"): return super().__new__(cls)
    def __init__(self, device="cpu"): self.placed = torch.device(device) == DEVICE
    device = property(lambda self: DEVICE if self.placed else torch.device("cpu"))


class Placed(torch.Tensor):
    "A tensor on the stand-in; `held` is its data on the CPU."
    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype,
                                                   device=DEVICE, requires_grad=False)

    def __init__(self, held): self.held = held

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == torch.Tensor.is_cuda.__get__: return True          # the branches that a GPU takes
        if func == torch.Tensor.is_meta.__get__: return False
        if func is torch.Tensor.tolist: return args[0].held.tolist()
        if func is torch.Tensor.numpy: raise TypeError("numpy() of a tensor on the GPU; copy it to the CPU first")
        with torch._C.DisableTorchFunctionSubclass(): return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return run(func, args, kwargs or {})


def check(func, args, kwargs):
    "RuntimeError where PyTorch would raise because tensors of `func` are on two devices."
    tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
    assert all(isinstance(one, Placed) or one.device != DEVICE for one in tensors), f"{func}: a tensor without data"
    placed = [one for one in tensors if isinstance(one, Placed)]
    if func in INDEXING and isinstance(args[0], Placed):              # positions may be on the CPU
        tensors = [args[0], *args[2:3]]
    wrong = [one for one in tensors if not isinstance(one, Placed) and one.dim()]
    if placed and wrong and func not in CROSSING:
        raise RuntimeError(f"{func}: tensors of {len(placed)} on the GPU and of shape {tuple(wrong[0].shape)} on the CPU")


def run(func, args, kwargs):
    "The result of an operation, on the device where PyTorch would leave it."
    check(func, args, kwargs)
    first = next((one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)), None)
    placed = any(isinstance(one, Placed) for one in tree_iter((args, kwargs)))
    target = kwargs.get("device")
    there = torch.device(target) == DEVICE if target is not None else placed
    if func in CROSSING and target is None: there = isinstance(first, Placed)
    if target is not None and torch.device(target) == DEVICE: kwargs = {**kwargs, "device": torch.device("cpu")}
    bare_args, bare = tree_map_only(Placed, lambda one: one.held, (tuple(args), kwargs))
    out = func(*bare_args, **bare)
    if not there: return out
    known = {id(one.held): one for one in tree_iter((args, kwargs)) if isinstance(one, Placed)}     # changed in place
    return tree_map_only(torch.Tensor, lambda one: known[id(one)] if id(one) in known else Placed(one), out)


def check_generator(random, args, kwargs):
    "RuntimeError where PyTorch would raise because generator and tensor are on two devices."
    target = kwargs.get("device") or next((one.device for one in args if isinstance(one, torch.Tensor)), "cpu")
    if getattr(random, "placed", False) != (torch.device(target) == DEVICE):
        raise RuntimeError("the random generator is not on the GPU, or its tensor is not")


class FromNumbers(TorchFunctionMode):
    "Python numbers become tensors below the operations that `OnDevice` sees: on the CPU first, then copied."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is not None: check_generator(kwargs["generator"], args, kwargs)
        if func is torch.Tensor.new_tensor:
            target, args = kwargs.pop("device", args[0].device), args[1:]
            return torch.tensor(*args, **kwargs).to(target)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            target = kwargs.pop("device")
            return func(*args, **kwargs).to(target)
        return func(*args, **kwargs)


class OnDevice(TorchDispatchMode):
    "Catches the operations whose tensors are all on the CPU: copies to the stand-in and tensors made there."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return run(func, args, kwargs or {})


def in_place_of(plain):
    "`torch.autocast`, which does nothing on the stand-in."
    return lambda kind, *given, **more: nullcontext() if kind == DEVICE.type else plain(kind, *given, **more)


def not_fused(plain):
    "`torch.optim.AdamW` without its fused step, which PyTorch refuses on a device that it has no kernels for."
    return lambda *given, **more: plain(*given, **{**more, "fused": False})


@contextmanager
def on_another_device():
    "The package on the stand-in: `core.device()` names it in every module."
    users = [module for name, module in list(sys.modules.items())
             if name.startswith("latentrefine") and getattr(module, "device", None) is core.device]
    changes = [(module, "device", lambda: DEVICE) for module in users]
    changes += [(torch, "Generator", Generator), (torch, "autocast", in_place_of(torch.autocast)),
                (torch.optim, "AdamW", not_fused(torch.optim.AdamW))]
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)       # tied weights stay tied, as on a GPU
    try:
        with ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for owner, name, value in changes: stack.enter_context(patch.object(owner, name, value))
            with FromNumbers(), OnDevice(): yield
    finally: torch.__future__.set_swap_module_params_on_conversion(swapped)
