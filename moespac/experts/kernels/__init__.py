"""Native kernels: experts computed on the host without torch. Whoever decides loads them without torch, too."""
