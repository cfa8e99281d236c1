"""Measuring: what decisions cost, what a sensor covers. numpy only, like the policies."""
