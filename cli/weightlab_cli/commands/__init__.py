"""One file a command; each is the click command `command` of its module."""
