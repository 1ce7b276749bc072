"""The executor: threads that take tiles, overlap reading, arithmetic and writing, and stay in a memory budget."""
