"""What `weightlab eval` can do: one file an evaluation, each with a click command called `command`."""
