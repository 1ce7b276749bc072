"""DARE (arXiv 2311.03099): elements of each difference at random, rescaled, and added up."""

from __future__ import annotations

from weightlab.methods._task_arithmetic import TaskArithmetic

METHOD = TaskArithmetic(keep="random", rescale=True)
