"""``moespac bench gpu``: one run on a machine with an accelerator, of everything that is claimed about it.

``contenders`` names who runs, ``jobs`` puts the work in order of importance, ``runs`` gives it to worker
processes while there is time, ``worker`` does it: ``stage`` builds the models (``shape`` and ``replay``: a model of
Qwen3-30B-A3B's shape whose routing and acceptance are replayed; and the embedded pair with wide experts),
``timing`` decodes and reads the gauges, ``peers`` are others' programs and ``exactness`` compares outputs.
``records``, ``goals``, ``tables``, ``report`` and ``plots`` say what came of it.
"""
