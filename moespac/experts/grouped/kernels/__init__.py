"""The Triton kernels. Import them late: where Triton is missing, experts on the accelerator run in torch."""
