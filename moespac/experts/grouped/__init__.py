"""All experts of a layer that lie on an accelerator, in a launch or two."""

from moespac.experts.grouped.experts import GroupedExperts

__all__ = ["GroupedExperts"]
