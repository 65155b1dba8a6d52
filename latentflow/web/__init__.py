"""The web page of `latentflow app` (extra `app`).

:mod:`page` is its layout, :mod:`studio` what a request does, :mod:`turns` whose turn it is. Only :mod:`page` knows
Gradio.
"""
