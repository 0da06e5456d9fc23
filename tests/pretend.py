"""Pretended cards: run a script, and all that it starts, as if this machine had a GPU.

    python tests/pretend.py SCRIPT FLAG...      or: -m MODULE FLAG...

A tensor on a card is a wrapper around a CPU tensor that says it is there, so values are those of a CPU. What a card
would refuse is refused: tensors of two devices in one operation, .numpy(), a card's tensor in a file, an index past the
cards, float64 on MPS, a CPU tensor in a collective of NCCL (which is gloo), and a wait for the card while
torch.cuda.set_sync_debug_mode("error") holds. Nothing is said of kernels, compiled code, NCCL itself, memory, or time.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor, wait_tensor
from torch.distributed.fsdp._fully_shard import _fsdp_init
from torch.distributed.tensor import DTensor
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


@dataclass
class Cards:
    type: str = "cuda"  # or mps
    count: int = 1  # cards that this process sees
    name: str = "NVIDIA H100 80GB HBM3"
    capability: str = "9.0"  # cards multiply bfloat16 from 8.0 on
    hip: str = ""  # version of ROCm, on AMD's cards


CARDS = Cards()
STATE = {"index": 0, "launched": 0, "sync_debug_mode": "default", "nccl": False, "meta": False}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount"}


def current():
    return torch.device(CARDS.type, STATE["index"])


def on_card(device=None):
    return isinstance(device, (str, torch.device)) and torch.device(device).type == CARDS.type


def dispatch(func, types, args=(), kwargs=None):
    """Run an operation on what the cards' tensors hold.  Its results are there if its arguments or `device` are."""
    if any(issubclass(t, (DTensor, AsyncCollectiveTensor)) for t in types):
        return NotImplemented  # these take themselves apart; their parts come back here
    kwargs, cards, others = kwargs or {}, [], []
    held_args = taken_off(args, cards, others)
    held_kwargs = {key: taken_off(value, cards, others) for key, value in kwargs.items()}
    name, target = func._schema.name.partition("::")[2], kwargs.get("device")
    if target is not None and target.type == "meta" and not STATE["meta"] and all(not t.is_meta for t in others):
        target = current()  # C++ asks for a tensor where one of the cards' is
    check_places(func, name, cards, others, target)
    if waits(name, cards, others, target, args, kwargs):
        wait(name)
    STATE["launched"] += bool(cards)

    held_kwargs.pop("pin_memory", None)
    if on_card(target):
        held_kwargs["device"] = torch.device("cpu")
    out = func(*held_args, **held_kwargs)
    if func.namespace == "_c10d_functional" and name != "wait_tensor":
        tree_map_only(torch.Tensor, wait_tensor, out)  # gloo, unlike a card, would be read while it still writes
    if name == "copy_":
        return args[0]
    return put_on(out, cards) if on_card(target) or (target is None and cards) else out


class OnCard(torch.Tensor):
    """held: the CPU tensor with the values.  C++ believes that this one has no memory, as on the meta device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        if CARDS.type == "mps" and held.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), dtype=held.dtype,
                                                   storage_offset=held.storage_offset(), device="meta")
        made.held, made.place = held, current()
        return made

    device = property(lambda self: self.place)
    is_cuda = property(lambda self: CARDS.type == "cuda")
    is_cpu = is_meta = property(lambda self: False)

    def set_data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.held = other.held

    data = property(torch.Tensor.detach, set_data)

    def numpy(self, **_):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        raise RuntimeError("a tensor on the card is pickled; a machine without a card could not read it")

    @classmethod
    def __torch_dispatch__(cls, *call):
        return dispatch(*call)


class Everywhere(TorchDispatchMode):  # it sees what makes a tensor on the card, too
    def __torch_dispatch__(self, *call):
        return dispatch(*call)


def taken_off(value, cards, others):
    """The arguments of an operation with the cards' tensors replaced by what they hold; collect both kinds."""
    if isinstance(value, OnCard):
        cards.append(value)
        return value.held
    if isinstance(value, torch.Tensor):
        others.append(value)
    if isinstance(value, (list, tuple)):
        return [taken_off(item, cards, others) for item in value]
    return value


def put_on(value, cards):
    """The results of an operation on the card; an operation in place returns its argument."""
    if isinstance(value, torch.Tensor):
        same = [t for t in cards if t.held is value]
        return same[0] if same else OnCard(value)
    if isinstance(value, (list, tuple)):
        return type(value)(put_on(item, cards) for item in value)
    return value


def check_places(func, name, cards, others, target):
    if on_card(target) and (target.index or 0) >= CARDS.count:
        raise RuntimeError("CUDA error: invalid device ordinal")
    if STATE["nccl"] and func._schema.name.startswith("c10d::") and others:
        raise RuntimeError(f"{name}: No backend type associated with device type {others[0].device.type}")
    if cards and name not in ("_to_copy", "copy_") and any(t.dim() > 0 and t.device.type == "cpu" for t in others):
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {current()} and cpu")


def waits(name, cards, others, target, args, kwargs):
    if name == "_to_copy":
        return target is not None and bool(cards) != on_card(target) and not kwargs.get("non_blocking")
    if name == "copy_":
        return bool(cards and others) and not (kwargs.get("non_blocking") or args[2:] == (True,))
    if name in ("index", "index_put_", "_index_put_impl_"):  # a mask's ones are counted
        return any(t.dtype == torch.bool for t in cards[1:])
    return name in WAITS and bool(cards)


def wait(what):
    if STATE["sync_debug_mode"] == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


class Stream(contextlib.nullcontext):
    """All work is done when it is asked for, so no stream has to wait for another."""

    def __init__(self, *_, **__):
        super().__init__(self)
        self.device = current()
        self.wait_stream = self.wait_event = lambda *_: None
        self.record_event = lambda event=None: event or Event()


class Event:
    """Waiting for an event costs nothing but where the card has no more work behind it."""

    def __init__(self, *_, **__):
        self.record()

    def record(self, *_):
        self.after = STATE["launched"]

    def synchronize(self):
        if self.after == STATE["launched"]:
            wait("event.synchronize")


def install(**settings):
    """Give this process cards, for as long as it lives.  settings: of `Cards`."""
    vars(CARDS).update(settings)
    pretend_tensors()
    if CARDS.type == "mps":
        pretend_mps()
    else:
        pretend_cuda()
        pretend_ranks()
    Everywhere().__enter__()


def pretend_tensors():
    _device._device_constructors()  # a cached list, which must know the real torch.empty
    empty, tensor, torch_function = torch.empty, torch.tensor, _device.DeviceContext.__torch_function__

    def tensor_there(data, *args, device=None, **kwargs):
        made = tensor(data, *args, **kwargs)
        return made if device is None else made.to(device)

    def noted(self, *args):
        """Tell torch.device("meta") from C++, which takes a card's tensor for one on the meta device."""
        STATE["meta"] = self.device.type == "meta"
        try:
            return torch_function(self, *args)
        finally:
            STATE["meta"] = False

    _device.DeviceContext.__torch_function__ = noted
    torch.tensor = tensor_there
    torch.empty = lambda *size, pin_memory=False, **kwargs: empty(*size, **kwargs)
    torch.Tensor.pin_memory = lambda self, *_: self
    torch.compile = lambda model=None, **_: model


def pretend_mps():
    to = torch.Tensor.to
    torch.backends.mps.is_available = lambda: True

    def to_mps(self, *args, **kwargs):  # C++ refuses mps before it asks anybody
        words = [*args, *kwargs.values()]
        if not any(map(on_card, words)):
            return to(self, *args, **kwargs)
        if True in words:  # non_blocking
            raise RuntimeError("MPS may read the memory after it was given back")
        moved = self if isinstance(self, OnCard) else OnCard(self.detach().clone())
        dtypes = [word for word in words if isinstance(word, torch.dtype)]
        return to(moved, *dtypes) if dtypes else moved

    torch.Tensor.to = to_mps


def pretend_cuda():
    cuda, stream, index_of = torch.cuda, Stream(), torch.cuda._get_device_index  # which wants an index

    def set_device(device):
        STATE["index"] = index_of(device)
        if STATE["index"] >= CARDS.count:
            raise RuntimeError("CUDA error: invalid device ordinal")

    class Properties:
        major, minor = map(int, CARDS.capability.split("."))

    cuda._lazy_init = lambda: None
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count = lambda: CARDS.count
    cuda.current_device = torch._C._cuda_getDevice = lambda: STATE["index"]
    cuda.set_device = set_device
    cuda.get_device_name = lambda *_: CARDS.name
    cuda.get_device_properties = lambda *_: Properties
    cuda.get_arch_list = lambda: ["sm_75", "sm_80", "sm_90"]
    cuda.synchronize = lambda *_: wait("cuda.synchronize")
    cuda.set_sync_debug_mode = lambda mode: STATE.update(sync_debug_mode=mode)
    cuda.max_memory_allocated = lambda *_: 1
    cuda.manual_seed_all = lambda seed: None
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = lambda *_: stream
    cuda.stream = cuda.device = contextlib.nullcontext
    torch._C._get_accelerator = lambda *_: torch.device("cuda")
    torch.version.cuda, torch.version.hip = (None, CARDS.hip) if CARDS.hip else ("13.0", None)


def pretend_ranks():
    """gloo underneath; objects travel on the card. A sharded tensor says where its parts are."""
    c10d, to = dist.distributed_c10d, torch.Tensor.to
    init_process_group = c10d.init_process_group

    def init(backend=None, *args, device_id=None, **kwargs):
        if backend == "nccl" and device_id is not None and device_id.index is None:
            raise ValueError("init_process_group device_id parameter must be a device with an index")
        STATE["nccl"] = backend == "nccl"
        return init_process_group("gloo" if backend == "nccl" else backend, *args, **kwargs)

    dist.init_process_group = c10d.init_process_group = init
    c10d._get_object_coll_device = lambda *_: str(current()) if STATE["nccl"] else "cpu"
    dist.is_nccl_available = c10d.is_nccl_available = lambda: True
    _fsdp_init._move_states_to_device = lambda *_: None  # FSDP2 would move them in place, which a wrapper cannot
    for name in ("device", "is_meta", "is_cuda", "is_cpu"):
        setattr(DTensor, name, property(lambda self, name=name: getattr(self._local_tensor, name)))
    DTensor.to = lambda self, *args, **kwargs: self if on_card(*args[:1]) else to(self, *args, **kwargs)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        hidden = "os.environ.get('CUDA_VISIBLE_DEVICES') == ''"
        Path(folder, "sitecustomize.py").write_text(f"import os, pretend\n{hidden} or pretend.install()\n")
        path = os.pathsep.join([folder, str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        sys.exit(subprocess.call([sys.executable, *sys.argv[1:]], env={**os.environ, "PYTHONPATH": path}))
