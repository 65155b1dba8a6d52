"""The web page of `latentflow app` (extra `app`).

:mod:`page` is its layout, :mod:`studio` what a request does, :mod:`guard` which requests are answered. Only
:mod:`page` knows Gradio.
"""
