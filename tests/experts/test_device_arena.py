"""An arena that gives its end back, and the driver calls that this takes."""

from __future__ import annotations

import ctypes

import pytest
import torch

from moespac.config import DeviceConfig
from moespac.experts.cuda.arena import MappedArena, PlainArena, open_arena
from moespac.experts.cuda.virtual_memory import CudaVirtualMemory, VirtualMemoryError, _Access, _Properties
from tests.experts.fake_cuda import PAGE, FakeVirtualMemory

CPU = torch.device("cpu")
CONFIG = DeviceConfig(arena_piece=2 * PAGE)


@pytest.mark.parametrize(("record", "piece"), [(PAGE, PAGE), (3 * PAGE, 2 * PAGE), (PAGE, 5 * PAGE)])
def test_it_frees_what_lies_wholly_beyond_its_last_slot(record: int, piece: int) -> None:
    memory = FakeVirtualMemory()
    arena = MappedArena(10, record, memory, piece)
    assert arena.records.shape == (10, record)
    arena.records.copy_(torch.arange(10, dtype=torch.uint8)[:, None].expand(10, record))
    for slots in (7, 6, 1):
        arena.shrink(slots)
        assert arena.records[:, -1].tolist() == list(range(slots)), "what stays is untouched"
        held = sum(memory.mapped.values())
        assert slots * record <= held < slots * record + piece
    arena.close()
    assert not memory.mapped and not memory.reserved


def test_no_room_leaves_nothing_behind() -> None:
    memory = FakeVirtualMemory(limit=5 * PAGE)
    with pytest.raises(torch.OutOfMemoryError):
        MappedArena(10, PAGE, memory, PAGE)
    assert not memory.mapped and not memory.reserved


def test_without_virtual_memory_it_is_one_allocation() -> None:
    def refuse(device: torch.device) -> FakeVirtualMemory:
        raise VirtualMemoryError("no CUDA driver library")

    arena = open_arena(8, PAGE, CPU, CONFIG, refuse)
    assert isinstance(arena, PlainArena) and not arena.keeps
    arena.shrink(3)
    assert arena.records.shape == (3, PAGE)


def test_memory_that_forgets_is_not_used() -> None:
    memory = FakeVirtualMemory()
    memory.tensor = lambda address, nbytes: torch.zeros(1, dtype=torch.uint8).expand(
        nbytes
    )  # one byte for all
    arena = open_arena(8, PAGE, CPU, CONFIG, lambda device: memory)
    assert isinstance(arena, PlainArena) and not memory.mapped and not memory.reserved


def test_the_arena_is_mapped_where_that_works() -> None:
    assert open_arena(8, PAGE, CPU, CONFIG, lambda device: FakeVirtualMemory()).keeps


class FakeLibrary:
    """libcuda as ctypes shows it: functions that fill in what they are given the address of."""

    def __init__(self, supported: int = 1, failing: str = "", code: int = 1) -> None:
        self.calls: list[tuple] = []
        self._supported = supported
        self._failing = failing
        self._code = code

    def __getattr__(self, name: str):
        def call(*arguments) -> int:
            plain = [each.value if hasattr(each, "value") else each for each in arguments]
            self.calls.append((name, *plain))
            if name == self._failing:
                return self._code
            if name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = self._supported
            elif name == "cuMemGetAllocationGranularity":
                arguments[0]._obj.value = 2 << 20
            elif name == "cuMemAddressReserve":
                arguments[0]._obj.value = 0x7F00_0000_0000
            elif name == "cuMemCreate":
                arguments[0]._obj.value = 77
            elif name == "cuGetErrorString":
                arguments[1]._obj.value = b"invalid argument"
            return 0

        return call

    def named(self, name: str) -> list[tuple]:
        return [arguments for called, *arguments in self.calls if called == name]


def open_memory(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> CudaVirtualMemory:
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)  # it is only there to make a context
    return CudaVirtualMemory(torch.device("cuda", 3), library)


def test_what_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary()
    memory = open_memory(library, monkeypatch)
    assert memory.granularity == 2 << 20
    assert library.named("cuDeviceGetAttribute")[0][1:] == [102, 3]
    base = memory.reserve(8 << 20)
    memory.map(base + (2 << 20), 2 << 20)
    ((_, size, properties, flags),) = library.named("cuMemCreate")
    assert (size, flags) == (2 << 20, 0)
    assert properties._obj.location.id == 3 and properties._obj.location.type == properties._obj.type == 1
    assert library.named("cuMemMap") == [[base + (2 << 20), 2 << 20, 0, 77, 0]]
    assert library.named("cuMemRelease") == [[77]], "the mapping alone holds the memory"
    ((address, size, access, count),) = library.named("cuMemSetAccess")
    assert (address, size, count, access._obj.flags) == (base + (2 << 20), 2 << 20, 1, 3)
    memory.unmap(base + (2 << 20), 2 << 20)
    assert library.named("cuMemUnmap") == [[base + (2 << 20), 2 << 20]]
    memory.free(base, 8 << 20)
    assert library.named("cuMemAddressFree") == [[base, 8 << 20]]


def test_structures_are_as_large_as_in_cuda_h() -> None:
    assert ctypes.sizeof(_Properties) == 32 and ctypes.sizeof(_Access) == 12


def test_errors_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VirtualMemoryError, match="no virtual memory management"):
        open_memory(FakeLibrary(supported=0), monkeypatch)
    with pytest.raises(VirtualMemoryError, match="cuMemAddressReserve: invalid argument"):
        open_memory(FakeLibrary(failing="cuMemAddressReserve"), monkeypatch).reserve(1)
    with pytest.raises(torch.OutOfMemoryError):
        open_memory(FakeLibrary(failing="cuMemCreate", code=2), monkeypatch).map(0, 1)
    library = FakeLibrary(failing="cuMemMap")
    with pytest.raises(VirtualMemoryError):
        open_memory(library, monkeypatch).map(0, 1)
    assert library.named("cuMemRelease"), "memory that could not be mapped is given back"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_no_driver_is_said() -> None:
    with pytest.raises(VirtualMemoryError):
        CudaVirtualMemory(torch.device("cuda", 0))
