"""DARE (arXiv 2311.03099) before the vote of TIES (arXiv 2306.01708)."""

from __future__ import annotations

from weightlab.methods._task_arithmetic import TaskArithmetic

METHOD = TaskArithmetic(keep="random", vote=True, rescale=True)
