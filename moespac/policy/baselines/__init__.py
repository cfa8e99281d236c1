"""Policies to compare with, each behind the same interface.

They are what each system's cache, prefetch and placement do with the routing, not its code. In every docstring
[code] is what was read in the system's public source, [abs] what its abstract says, [recall] what is generally
known of it; the rest is assumed by us. With an accelerator, that is the device of the original; without one, host
memory stands for it, storage for host memory, and all experts run on the host.
"""
