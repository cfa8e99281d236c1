"""PLAN: will a model fit a machine, and how fast will it be? Answered from a configuration and headers alone."""
