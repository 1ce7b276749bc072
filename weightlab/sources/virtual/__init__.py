"""Sources that lie in no file of their own: in memory, renamed, computed."""
