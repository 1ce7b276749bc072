"""TIES (arXiv 2306.01708): the largest elements of each difference, of which those count that agree on the sign."""

from __future__ import annotations

from weightlab.methods._task_arithmetic import TaskArithmetic

METHOD = TaskArithmetic(keep="magnitude", vote=True, normalize=True)
