"""From a checkpoint to picture files: what the drawing programs and the web page share.

:mod:`config` their common flags, :mod:`checkpoint` opening one, :mod:`conditions` what each picture shows, :mod:`draw`
drawing with one seed per picture, :mod:`files` free names and formats, :mod:`sheets` grids. Nothing imports torch
before it draws, so that `--help` answers at once.
"""
