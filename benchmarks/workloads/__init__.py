"""Real training runs on the CPU, one module per kind; each fills a folder with saves."""
