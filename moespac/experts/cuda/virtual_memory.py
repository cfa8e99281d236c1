"""CUDA's virtual memory management: addresses reserved once, physical memory mapped behind them and taken away.

From the driver itself: torch has it within its allocator only. Structures and constants are those of cuda.h.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_size_t, c_ubyte, c_uint64, c_ushort, c_void_p
from typing import Any, Protocol

import torch

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_SUPPORTED = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED: memory of the device, as cudaMalloc's
_ON_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE
_RECOMMENDED = 1  # CU_MEM_ALLOC_GRANULARITY_RECOMMENDED


class VirtualMemoryError(Exception):
    """It is not to be had here. Its text says why."""


class VirtualMemory(Protocol):
    """Of one device. Addresses and sizes are multiples of ``granularity``."""

    granularity: int  # bytes

    def reserve(self, nbytes: int) -> int:
        """The first of ``nbytes`` addresses with nothing behind them."""
        ...

    def map(self, address: int, nbytes: int) -> None:
        """Put memory behind these. Raises torch.OutOfMemoryError where there is none."""
        ...

    def unmap(self, address: int, nbytes: int) -> None:
        """Give back what one ``map`` put there."""
        ...

    def free(self, address: int, nbytes: int) -> None:
        """Give the addresses back; nothing is behind them any more."""
        ...

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        """(nbytes,) uint8 that lies there and does not own it."""
        ...


class _Location(ctypes.Structure):  # CUmemLocation
    _fields_ = [("type", c_int), ("id", c_int)]


class _Flags(ctypes.Structure):
    _fields_ = [
        ("compressionType", c_ubyte),
        ("gpuDirectRDMACapable", c_ubyte),
        ("usage", c_ushort),
        ("reserved", c_ubyte * 4),
    ]


class _Properties(ctypes.Structure):  # CUmemAllocationProp
    _fields_ = [
        ("type", c_int),
        ("requestedHandleTypes", c_int),
        ("location", _Location),
        ("win32HandleMetaData", c_void_p),
        ("allocFlags", _Flags),
    ]


class _Access(ctypes.Structure):  # CUmemAccessDesc
    _fields_ = [("location", _Location), ("flags", c_int)]


class CudaVirtualMemory:
    """Raises VirtualMemoryError where there is no driver, or the device cannot do it."""

    def __init__(self, device: torch.device, library: Any = None) -> None:
        self._device = device
        self._driver = library or _load_driver()
        torch.zeros(1, device=device)  # the thread then has the device's context, which the driver needs
        number = device.index if device.index is not None else torch.cuda.current_device()
        supported = c_int(0)
        self._call("cuDeviceGetAttribute", ctypes.byref(supported), c_int(_SUPPORTED), c_int(number))
        if not supported.value:
            raise VirtualMemoryError("the device has no virtual memory management")
        location = _Location(_ON_DEVICE, number)
        self._properties = _Properties(type=_PINNED, location=location)
        self._access = _Access(location, _READ_WRITE)
        size = c_size_t(0)
        self._call(
            "cuMemGetAllocationGranularity",
            ctypes.byref(size),
            ctypes.byref(self._properties),
            c_int(_RECOMMENDED),
        )
        self.granularity = size.value

    def reserve(self, nbytes: int) -> int:
        address = c_uint64(0)
        self._call(
            "cuMemAddressReserve",
            ctypes.byref(address),
            c_size_t(nbytes),
            c_size_t(0),
            c_uint64(0),
            c_uint64(0),
        )
        return address.value

    def map(self, address: int, nbytes: int) -> None:
        memory = c_uint64(0)
        self._call(
            "cuMemCreate", ctypes.byref(memory), c_size_t(nbytes), ctypes.byref(self._properties), c_uint64(0)
        )
        try:
            self._call("cuMemMap", c_uint64(address), c_size_t(nbytes), c_size_t(0), memory, c_uint64(0))
        finally:
            self._call("cuMemRelease", memory)  # from now on the mapping alone holds it
        self._call(
            "cuMemSetAccess", c_uint64(address), c_size_t(nbytes), ctypes.byref(self._access), c_size_t(1)
        )

    def unmap(self, address: int, nbytes: int) -> None:
        self._call("cuMemUnmap", c_uint64(address), c_size_t(nbytes))

    def free(self, address: int, nbytes: int) -> None:
        self._call("cuMemAddressFree", c_uint64(address), c_size_t(nbytes))

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        return torch.as_tensor(_Range(address, nbytes), device=self._device)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError("no device memory is left for expert slots")
        if code:
            text = c_char_p()
            self._driver.cuGetErrorString(c_int(code), ctypes.byref(text))
            raise VirtualMemoryError(f"{name}: {(text.value or b'unknown error').decode()}")


class _Range:
    """Device memory as torch takes it from other libraries."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _load_driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise VirtualMemoryError(f"no CUDA driver library ({error})") from None
