"""The web page of `latentflow app` (extra `app`).

:mod:`page` has its layout, :mod:`inference_server` answers requests, :mod:`guard` refuses those of strangers, and
:mod:`serving` runs all of them at an address. Only :mod:`page` and :mod:`serving` import Gradio.
"""
