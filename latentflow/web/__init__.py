"""The web page of `latentflow app` (extra `app`).

:mod:`page` is its layout, :mod:`studio` what a request does, :mod:`guard` which requests are answered, :mod:`serving`
what ties them to an address. Only :mod:`page` and :mod:`serving` know Gradio.
"""
