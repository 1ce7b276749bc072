"""Every command, on the kinds of folder that it takes."""

from __future__ import annotations

from collections.abc import Iterator

MODEL = (
    ("status", "{it}"),
    ("verify", "{it}"),
    ("inspect", "{it}"),
    ("inspect", "{it}", "--base", "mine/base"),
    ("apply", "{it}", "mine/second.safetensors", "-o", "out/new"),
    ("apply", "{it}", "mine/second.safetensors", "--in-place", "--dry-run"),
    ("diff", "mine/base", "{it}", "-o", "out/d.safetensors"),
    ("diff", "{it}", "mine/tuned", "-o", "out/d.safetensors"),
    ("compare", "mine/base", "{it}"),
    ("connectivity", "{it}", "mine/tuned", "mine/other"),
    ("transfer", "mine/base", "mine/tuned", "{it}", "-o", "out/new"),
    ("transfer", "mine/base", "{it}", "mine/other", "-o", "out/new"),
    ("signature", "mine/base", "{it}", "mine/tuned", "-o", "out/s.safetensors"),
    ("lora", "extract", "{it}", "mine/tuned", "-o", "out/new", "--rank", "2"),
    ("lora", "export", "mine/change.safetensors", "{it}", "-o", "out/new", "--rank", "2"),
    ("twin", "split", "{it}", "a=mine/tuned", "b=mine/other", "-o", "out/new"),
    ("apply", "{it}", "mine/second.safetensors", "--in-place", "--links", "copy"),
    ("apply", "{it}", "mine/second.safetensors", "--in-place"),
    ("scale", "{it}", "mine/change.safetensors", "0.5"),
    ("remove", "{it}", "mine/change.safetensors"),
    ("remove", "{it}", "--all"),
    ("remove", "{it}", "--forget"),
    ("status", "{it}"),
)
PATCH = (
    ("verify", "{it}"),
    ("inspect", "{it}"),
    ("apply", "mine/base", "{it}", "-o", "out/new"),
    ("apply", "mine/base", "{it}", "-o", "out/new", "--dry-run"),
    ("compose", "{it}", "mine/second.safetensors", "-o", "out/c.safetensors"),
    ("compare", "{it}", "mine/second.safetensors"),
    ("identify", "mine/second.safetensors", "{it}"),
    ("lora", "export", "{it}", "mine/base", "-o", "out/new", "--rank", "2"),
    ("lora", "import", "{it}", "mine/base", "-o", "out/p.safetensors"),
    ("transfer", "mine/base", "{it}", "mine/other", "-o", "out/new"),
    ("twin", "split", "mine/base", "a={it}", "b=mine/other", "-o", "out/new"),
)
TWIN = (
    ("twin", "export", "{it}", "-o", "out/new", "--rank", "2"),
    ("twin", "route", "{it}", "--data", "one=mine/base/README.md", "--data", "two=mine/base/README.md", "--dry-run"),
    ("verify", "{it}"),
    ("inspect", "{it}"),
)
PLAN = (("recycle", "{it}/plan.yaml", "--dry-run"), ("recycle", "{it}/plan.yaml"))
COMMANDS = {
    **dict.fromkeys(("model", "sharded", "stack"), MODEL),
    **dict.fromkeys(("patch", "patches", "adapter"), PATCH),
    "twin": TWIN,
    "plan": PLAN,
}


def commands(kind: str) -> Iterator[list[str]]:
    """The command lines for one of the stranger's folders."""
    it = f"stranger/{kind}" + ("/change.safetensors" if kind == "patch" else "")
    for words in COMMANDS[kind]:
        yield [word.format(it=it) for word in words]
