"""Scheduling experts over memories and devices: the books of the tiers, the flights between them, and the event
loop of a layer. It moves no byte and computes no expert itself (see ``ports``), so the engine runs it over torch
and threads, and the simulator runs the very same code over a virtual clock. No torch here; a test asserts it.
"""
