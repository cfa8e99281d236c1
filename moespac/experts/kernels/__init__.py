"""Native kernels: experts computed on the host without torch."""

from moespac.experts.kernels.host import HostKernel

__all__ = ["HostKernel"]
