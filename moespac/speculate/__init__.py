"""Tokens ahead: sampling, drafters, verification, and how many tokens to draft.

Import the modules by name: the simulator uses the governor, and must not load torch on the way.
"""
