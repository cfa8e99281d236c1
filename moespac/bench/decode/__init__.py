"""``moespac bench decode``: this engine beside what people would use instead, under one memory limit, in turn.

``contenders`` names who runs, ``files`` makes the same weights for each, ``worker`` runs one of them in a process
of its own, ``runs`` takes turns, and ``records``, ``bound``, ``report`` and ``plots`` say what came of it.
"""
