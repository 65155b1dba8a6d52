"""The web page of `latentflow app` (extra `app`).

:mod:`page` has its layout, :mod:`tab` the parts of a tab and its events, :mod:`inference_server` answers requests,
:mod:`checkpoint_facts` reads what the page says of the checkpoint, :mod:`guard` refuses requests of strangers, and
:mod:`serving` runs all of them at an address. Only :mod:`page`, :mod:`tab` and :mod:`serving` import Gradio.
"""
