"""The CUDA tier: an arena on the card, copies on a stream of their own, events that say when something is done."""

from moespac.experts.cuda.accelerator import CudaAccelerator
from moespac.experts.cuda.driver import TorchDriver

__all__ = ["CudaAccelerator", "TorchDriver"]
