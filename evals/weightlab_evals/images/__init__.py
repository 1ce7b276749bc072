"""Image classifiers scored on clean and corrupted images, with patches that are put on in memory."""
