"""From a checkpoint to image files, shared by the sampling programs and the web page.

:mod:`config` common flags, :mod:`checkpoint` opening one with its adapters, :mod:`sample` one seed per image,
:mod:`images` file names, formats, sheets. Nothing imports torch before it samples, so that `--help` answers at once.
"""
