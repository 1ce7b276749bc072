"""PEFT adapters: what their files say, and the change that it makes to each tensor."""
