"""One modality's modules: reading, writing, and how they are built."""
