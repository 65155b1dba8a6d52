"""Sampling images from a checkpoint, for the programs and the web page.

:mod:`sample` opens a pipeline with its adapters and generates images with one seed each, :mod:`images` reads and writes
image files. torch is imported when images are sampled, not before, so that `--help` answers at once.
"""
